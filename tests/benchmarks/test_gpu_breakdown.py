"""What kernels are called, and what they are taken for."""

from __future__ import annotations

import pytest

from benchmarks.gpu import breakdown


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("triton_tem_fused_mst_linear_3", "templates"),
        ("triton_red_fused_native_layer_norm_0", "generated"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "dense products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and clipping"),
        ("Memset (Device)", "copies and fills"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", breakdown.OTHER),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert breakdown.kind(kernel) == kind
