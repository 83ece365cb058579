# One reward behind one port, without the trainer. From the root of the repository:
#
#   docker build -f docker/reward.Dockerfile --build-arg EXTRA=open-clip -t adagrpo-reward:open-clip .
#   docker run --rm --gpus all -p 127.0.0.1:9001:9001 -v ~/.cache/huggingface:/home/reward/.cache/huggingface \
#     -v "$PWD/token:/run/secrets/token:ro" adagrpo-reward:open-clip hpsv2 --device cuda
#
# The token file needs mode 0600 and owner 1000. Without the network, mount the weights and name them in --settings.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu makes an image for machines without a GPU.
FROM python:3.11-slim

ARG EXTRA=open-clip
ARG TORCH_INDEX=

RUN useradd --create-home --uid 1000 reward \
    && install --directory --owner reward /home/reward/.cache /home/reward/.cache/huggingface
WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY scripts/environment.sh scripts/make_reward_env.sh scripts/
ENV PIP_NO_CACHE_DIR=1
# The package itself comes after its requirements, so that a change of code does not install torch again.
RUN mkdir -p adagrpo_train rewards configs && printf '__version__ = "0"\n' >adagrpo_train/__init__.py \
    && python=$(ADAGRPO_TORCH_INDEX=$TORCH_INDEX bash scripts/make_reward_env.sh "$EXTRA") \
    && ln -s "${python%/bin/python}" venv
COPY rewards rewards

USER reward
ENV PYTHONUNBUFFERED=1
EXPOSE 9001
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m \
    CMD ["venv/bin/python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9001/healthz', timeout=2)"]
# A container's port is reached from outside it, so the server asks for a token. What `docker run` adds comes after.
ENTRYPOINT ["/app/venv/bin/python", "-m", "rewards.serve", "--host", "0.0.0.0", "--token-file", "/run/secrets/token"]
CMD ["tiny_clip"]
