# The trainer, for NVIDIA GPUs; where there is none it trains on the CPU. From the root of the repository:
#
#   docker build -f docker/trainer.Dockerfile -t adagrpo-trainer .
#   docker run --rm --init --gpus all --shm-size 8g -v outputs:/home/trainer/outputs -v cache:/home/trainer/.cache \
#     adagrpo-trainer adagrpo-train adagrpo=on
#   docker run ... adagrpo-trainer accelerate launch --multi_gpu --num_processes 8 -m adagrpo_train adagrpo=on
#
# CUDA_IMAGE and TORCH_INDEX belong together. The torch of the Python package index, 2.13.0, brings the libraries of CUDA
# 13.0; the image adds what tells the driver's version and, in its -devel flavour, the compiler that DeepSpeed's own
# kernels (offload) need. For an older driver take a build of torch for an older CUDA, for example
#   --build-arg CUDA_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04 --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
# and a version of torch in constraints.txt that is there. CUDA_IMAGE needs apt and Python 3.11 or newer (Ubuntu 24.04,
# Debian 12 or later).
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-base-ubuntu24.04
FROM ${CUDA_IMAGE}

ARG TORCH_INDEX=

# g++ and Python's headers are for torch.compile, which builds its kernels when they are first used.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu's images come with a user 1000 of their own.
RUN if id ubuntu >/dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --create-home --uid 1000 trainer \
    && install --directory --owner trainer /home/trainer/.cache /home/trainer/outputs
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY docker/constraints.txt docker/
ENV PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/app/docker/constraints.txt PIP_BUILD_CONSTRAINT=/app/docker/constraints.txt
# The package itself comes after its requirements, so that a change of code does not install torch again.
RUN mkdir -p adagrpo_train rewards configs && printf '__version__ = "0"\n' >adagrpo_train/__init__.py \
    && python3 -m venv venv \
    && venv/bin/python -m pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt torch \
    && venv/bin/python -m pip install --constraint constraints.txt --editable ".[client,deepspeed,serve]"
COPY adagrpo_train adagrpo_train
COPY configs configs
COPY rewards rewards

USER 1000:1000
WORKDIR /home/trainer
ENV PATH=/app/venv/bin:$PATH PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCHINDUCTOR_CACHE_DIR=/home/trainer/.cache/inductor TRITON_CACHE_DIR=/home/trainer/.cache/triton
# A run ends by itself, and says by its exit status how.
HEALTHCHECK NONE
ENTRYPOINT []
CMD ["adagrpo-train", "--help"]
