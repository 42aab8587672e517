"""Fused kernels, in Triton, for what lies between the matrix products of a Kraken's layer.

A Kraken's N sub-layers are stacked in one tensor (N, B, T, D). Each has a gain of its own for its norm, and a sum over
the leading axis goes to the other ranks. That layout is why there are kernels here. What libraries have for a plain
layout, and why it does not serve:

- Liger Kernel (arXiv 2410.10989) has `LigerFusedAddRMSNormFunction`, and quack an RMSNorm with a residual. Both take
  one gain (D,), so N sub-layers need N launches. Neither sums over sub-layers, and neither has the form of the FFN,
  LN(a_i + s), in which the residual is not what is normalized. quack needs a Hopper GPU and CUTLASS besides.
- PyTorch's `layer_norm` and `rms_norm` take one gain as well, so that the N gains are another pass. `torch.compile`
  fuses what is within a part of a layer. It sees neither the sums of gradients between the parts nor the sum over the
  sub-layers, and it reads everything once more for the gradient of a gain.
- Liger's SwiGLU and PyTorch's GELU are element-wise and know no layout. What is added here: without compilation, too,
  the activation is not kept for the backward pass, which computes it again in the kernel of its gradient.
- FlashAttention's `flash_attn_qkvpacked_func` writes a packed gradient, but has neither grouped-query attention nor a
  way to undo the rotation of rotary embeddings in the same pass. PyTorch's attention has no packed form.

Each kernel has a twin in plain PyTorch (`twins`), with which the tests compare it on a CPU, by Triton's interpreter.
`fused` and `twins` have the same functions; `selection` says when kernels are used. The baselines have none: their
layout is the plain one, which `torch.compile` fuses.
"""
