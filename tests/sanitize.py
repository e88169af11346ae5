"""A few small products that reach every kernel configuration, to be run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck --kernel-name kns=marlin \\
        --error-exitcode 1 python tests/sanitize.py

Each is checked against float64 as well. `python tests/sanitize.py sm90 sm90_few` runs only these.
Depends on gpu_problems.py; `make gpu-sanitize` calls it.
"""

from __future__ import annotations

import logging
import sys
import time

import torch
from gpu_problems import (
    ERR_LIMIT,
    cases_of_all_configs,
    forced,
    mul,
    random_A,
    random_weight,
    relative_error,
)

import marlin

log = logging.getLogger("sanitize")

MAX_MULTIPLICATIONS = 2**31  # of a case: racecheck slows a product down a thousandfold


def main() -> int:
    """Returns the exit status: 1 if a product is wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        log.error("sanitize: torch sees no CUDA device")
        return 1
    num_wrong = 0
    backends = sys.argv[1:] or ["sm80", "sm90", "sm90_few"]
    for kind, case in sorted(cases_of_all_configs().items()):
        if case.backend not in backends:
            continue
        if case.M * case.K * case.N > MAX_MULTIPLICATIONS:
            log.warning(f"{kind} {case}: too large, left out")
            continue
        start = time.perf_counter()
        A = random_A(case.M, case.K)
        weight = random_weight(case.K, case.N, case.group)
        with forced(case.backend, case.tile_idx):
            C = mul(A, weight, sms=case.sms)
        err = relative_error(C, A.double() @ weight.dense)
        num_wrong += not err <= ERR_LIMIT
        seconds = time.perf_counter() - start
        log.info(f"{kind} {case}: {err:.1e}, {seconds:.1f} s")
    # Tails of K and N, and a bias.
    weight = random_weight(256, 192, 32)
    for backend in (*backends, "auto"):
        for M in (1, 7, 13) if backend == "sm90_few" else (1, 7, 33, 130):
            x = random_A(M, 250)
            bias = random_A(1, 150)[0]
            with forced(backend):
                y = marlin.linear(x, weight.B, weight.s, bias, in_features=250, out_features=150)
            exact = x.double() @ weight.dense[:250, :150] + bias.double()
            num_wrong += not relative_error(y, exact) <= ERR_LIMIT
    log.info(f"{num_wrong} products are wrong")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
