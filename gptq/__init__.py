"""GPTQ for Marlin: scripts, run by path (`python gptq/llama2.py MODEL`), and what they share."""
