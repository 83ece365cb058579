# One reward behind one port, without the trainer. From the root of the repository:
#
#   docker build -f docker/reward.Dockerfile --build-arg EXTRA=open-clip -t adagrpo-reward:open-clip .
#   docker run --rm --gpus all -p 127.0.0.1:9001:9001 -v ~/.cache/huggingface:/home/reward/.cache/huggingface \
#     -v "$PWD/token:/run/secrets/token:ro" adagrpo-reward:open-clip hpsv2 --device cuda
#
# EXTRA is an extra of pyproject.toml: open-clip, transformers, hpsv3, judge, shapes. The token file needs mode 0600 and
# owner 1000. Without the network, mount the weights and name them in --settings.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu makes an image for machines without a GPU; empty takes the build of
# the Python package index, which brings its own CUDA 13.0.
# PYTHON_IMAGE is any Debian or Ubuntu image with Python 3.11 or newer and its venv module.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm
FROM ${PYTHON_IMAGE}

ARG EXTRA=open-clip
ARG TORCH_INDEX=

RUN useradd --create-home --uid 1000 reward \
    && install --directory --owner reward /home/reward/.cache /home/reward/.cache/huggingface /run/secrets
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/environment.sh scripts/make_reward_env.sh scripts/
COPY docker/constraints.txt docker/
ENV PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/app/docker/constraints.txt PIP_BUILD_CONSTRAINT=/app/docker/constraints.txt
# The package itself comes after its requirements, so that a change of code does not install torch again.
RUN mkdir -p adagrpo_train rewards configs && printf '__version__ = "0"\n' >adagrpo_train/__init__.py \
    && python=$(ADAGRPO_TORCH_INDEX=$TORCH_INDEX bash scripts/make_reward_env.sh "$EXTRA") \
    && ln -s "${python%/bin/python}" venv
COPY rewards rewards

USER 1000:1000
ENV PYTHONUNBUFFERED=1
EXPOSE 9001
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m \
    CMD ["venv/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9001/readyz', timeout=2)"]
# A container's port is reached from outside it, so the server asks for a token. What `docker run` adds comes after.
ENTRYPOINT ["/app/venv/bin/python", "-m", "rewards.serve", "--host", "0.0.0.0", "--token-file", "/run/secrets/token"]
CMD ["tiny_clip"]
