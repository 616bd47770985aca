"""How tensors travel between the devices of two workers: activations, KV and weights.

    frame     | header | buffers |        Link: shared memory or TCP, in order, by priority
                            |
    HOST      the buffer is the tensor    on a GPU it is copied to the host, and back over there
    CUDA_IPC  the buffer is a ticket      the tensor lies in the other GPU's memory, same host
    NCCL      the buffer is a ticket      the tensor is on its way from GPU to GPU, any host

`base.py` is the seam. Two workers agree on a channel when they open a link (`choice.py`,
`factory.py`), and the link owns it. `ring.py` is what both GPU channels have in common.
"""
