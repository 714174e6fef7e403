"""CUDA for gpu.py: kernels.cu, and device.py, which starts the kernels and records a training
step."""
