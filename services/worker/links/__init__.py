"""Worker-to-worker transport: activations, KV exchange and weights between the members of a group.

A `LinkEndpoint` opens and accepts links; a link is two threads over one byte stream (a ring in
shared memory on one host, TCP between hosts) with one priority queue in front.

    engine thread --send()--> FrameQueue --chunks--> ByteStream ~~~ peer
    engine thread <--on_frame-- Reassembler <-------- ByteStream ~~~ peer

Tensors go in the frames or, from GPU to GPU, beside them: see `services/worker/channels`.
"""
