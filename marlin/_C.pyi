"""Types of the extension module; csrc/bindings.cpp says what the functions do."""

from torch import Tensor

def mul(
    A: Tensor,
    B: Tensor,
    C: Tensor,
    s: Tensor,
    workspace: Tensor,
    thread_k: int,
    thread_n: int,
    sms: int,
    max_par: int,
    /,
) -> None: ...
def linear(
    x: Tensor,
    B: Tensor,
    s: Tensor,
    bias: Tensor | None,
    in_features: int | None,
    out_features: int | None,
    z: Tensor | None,
    perm: Tensor | None,
    /,
) -> Tensor: ...
def choose_config_sm80(
    M: int,
    N: int,
    K: int,
    group: int,
    capability: int,
    num_sms: int,
    smem_bytes: int,
    tile_n: int = -1,
    num_sms_hint: int = -1,
    tile_idx: int = -1,
) -> dict[str, int]: ...

choose_config_sm90 = choose_config_sm80
choose_config_sm90_few = choose_config_sm80

def set_cuda_options(backend: str, overlap: bool, tile_idx: int) -> tuple[str, bool, int]: ...
def layout_tables(K: int, N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def has_cuda() -> bool: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...
