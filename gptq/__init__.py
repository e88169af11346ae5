"""GPTQ for Marlin: scripts and the modules they share. Run the scripts by path, e.g. `python gptq/llama2.py MODEL`."""
