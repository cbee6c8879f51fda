# The server as an image: `docker build .` gives the target cpu, `--target cuda` the one for NVIDIA GPUs.
# tests/deploy/test_image.py runs the lines that install Python packages, and the entrypoint.

FROM python:3.11.14-slim-bookworm AS build
ENV VIRTUAL_ENV=/opt/neurontune
ENV PATH=${VIRTUAL_ENV}/bin:${PATH}
WORKDIR /src
RUN python -m venv "$VIRTUAL_ENV"
COPY constraints.txt ./

# Torch comes first and in a layer of its own: it is most of the image and seldom changes.
FROM build AS build-cpu
# Where torch without CUDA is; empty: wherever pip looks.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY modulation ./modulation
COPY server ./server
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt .

FROM build AS build-cuda
# More of pyproject.toml's optional dependencies, separated by commas: vllm.
ARG EXTRAS=
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY modulation ./modulation
COPY server ./server
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:3.11.14-slim-bookworm AS runtime
# tini is process 1: without it a SIGTERM while the model loads would be ignored. Versions are not pinned since
# Debian keeps only the newest of each package: a pinned one would soon not build.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 neurontune \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin neurontune \
    && install --directory --owner 10001 --group 10001 /models
COPY deploy/ready.py /usr/local/lib/neurontune/ready.py
# Nothing is written but to /tmp, and to /models where a model is fetched by its name on the hub. All addresses are
# listened on, so the server starts only with a key file, or told --open-to-anyone.
ENV VIRTUAL_ENV=/opt/neurontune
ENV PATH=${VIRTUAL_ENV}/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/models/.huggingface \
    HF_MODULES_CACHE=/tmp/huggingface-modules \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    XDG_CACHE_HOME=/tmp/cache \
    NEURONTUNE_HOST=0.0.0.0
WORKDIR /models
VOLUME ["/models"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "/usr/local/lib/neurontune/ready.py"]
ENTRYPOINT ["tini", "--", "neurontune"]
CMD ["serve"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="NeuronTune Server" \
    org.opencontainers.image.description="An inference server whose MLP neurons are modulated per request, at the safety level each request asks for." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}"
USER 10001:10001

FROM runtime AS cuda
USER 0:0
# Triton compiles the launchers of its kernels when they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/neurontune /opt/neurontune
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# The last one is what `docker build` makes when no target is named.
FROM runtime AS cpu
COPY --from=build-cpu /opt/neurontune /opt/neurontune
