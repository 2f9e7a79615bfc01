"""Backend ``torch_native``: what a user of plain torch picks instead, each choice forced by name.

torch has no FP4 codec, so ``fp4_quantize`` and ``fp4_dequantize`` are not offered.
"""

from __future__ import annotations

from vbench.backend import Availability, DeclaredBackend, Device


def probe(device: Device) -> Availability:
    """Usable on the CPU always, on ``cuda`` where torch finds a device.

    Switches TF32 off for float32 products (the caller asked for fp32) and records the setting in ``versions``, and
    what was activated by ``torch.nn.attention.activate_flash_attention_impl``.
    """
    import torch
    import torch.nn.attention

    versions = {"torch": str(torch.__version__)}
    # Process-global: which flash attention SDPA calls. torch's own (FlashAttention-2) goes unsaid.
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if active:
        versions["flash_attention_impl"] = active
    if device == "cuda":
        if not torch.cuda.is_available():
            return Availability(False, "none", "torch finds no CUDA device; run with --device cpu", versions)
        torch.set_float32_matmul_precision("highest")
        versions["float32_matmul_precision"] = torch.get_float32_matmul_precision()
        versions["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    return Availability(True, "native", "", versions)


BACKEND = DeclaredBackend(
    name="torch_native",
    role="peer",
    summary="plain torch: cuBLAS on a decoded weight, SDPA with each of its backends forced, everything resident",
    ops={
        "fp4_linear": "vbench.kernels.peers.dense_linear:make",
        "attention": "vbench.kernels.peers.sdpa:make",
        "attention_backward": "vbench.kernels.peers.sdpa_backward:make",
        "attention_extended": "vbench.kernels.peers.sdpa_extended:make",
        "attention_extended_backward": "vbench.kernels.peers.sdpa_extended:make_backward",
        "attention_masked_backward": "vbench.kernels.peers.sdpa_masked:make",
        "tier_stack": "vbench.kernels.peers.all_resident:make",
        "tier_fetch": "vbench.kernels.peers.copy_decode:make",
        "offload_pass": "vbench.kernels.peers.offload:make",
        "decoder_block": "vbench.kernels.peers.block:make",
        "int8_linear": "vbench.kernels.peers.int8_linear:make",
        "svd": "vbench.kernels.peers.insight:make_svd",
        "elementwise_chain": "vbench.kernels.peers.insight:make_chain",
        "train_step": "vbench.kernels.peers.model_steps:make",
        "generate": "vbench.kernels.peers.model_steps:make",
    },
    variants={
        "fp4_linear": ("cublas_bf16", "cublas_fp16", "cublas_fp32", "eager_dequant", "torch_compile"),
        "attention": ("sdpa_math", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
        "attention_backward": ("sdpa_math", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
        "attention_extended": ("sdpa_math", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
        "attention_extended_backward": ("sdpa_math", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
        "attention_masked_backward": ("sdpa_math", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient"),
        "tier_stack": ("all_resident",),
        "tier_fetch": ("copy_decode",),
        "offload_pass": ("all_resident", "double_buffer", "fsdp2"),
        "decoder_block": ("cublas", "eager_dequant"),
        "int8_linear": ("int_mm", "eager_dequant"),
        "svd": ("device", "host"),
        "elementwise_chain": ("device", "numpy"),
        "train_step": ("eager", "torch_compile", "fsdp2"),
        "generate": ("eager", "torch_compile", "fsdp2"),
    },
    probe_function="vbench.kernels.peers.torch_native:probe",
)
