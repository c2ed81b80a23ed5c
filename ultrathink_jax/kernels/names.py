"""Names by which remat policies know what kernels made."""

KERNEL_OUTPUT = "kernel_output"
CUDNN_ATTENTION = "dot_product_attention_fwd"  # in the names of the primitives that JAX calls cuDNN by
