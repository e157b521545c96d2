# The environment for GPUs, in the exact versions of constraints.txt. Build it from the repository:
#   docker build -t nemotron .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" nemotron train tiny/pretrain
# PyTorch's wheel brings CUDA; the machine needs NVIDIA's driver and container toolkit only.
FROM python:3.11-slim-bookworm

# Triton compiles a small launcher in C for each kernel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nemotron
COPY constraints.txt ./
# torch and Triton alone are a layer that changes rarely
RUN pip install --no-cache-dir --constraint constraints.txt torch triton
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nemotron nemotron
COPY recipes recipes
COPY launch launch
RUN pip install --no-cache-dir --constraint constraints.txt '.[hf,plot,rl,track]' \
    && nemotron train tiny/smoke --dry-run device=cpu

WORKDIR /work
ENTRYPOINT ["nemotron"]
CMD ["doctor"]
