"""How a server uses this machine: threads, kernels, pages, queues, processes."""
