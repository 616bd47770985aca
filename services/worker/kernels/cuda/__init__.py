"""Triton kernels of CUDA workers. Nothing else imports this, so that others need no Triton."""
