# One image for the head and for machines with cards, by build arguments:
#
#   docker build -t crynux-cluster:0.1.0-cpu .
#   docker build -t crynux-cluster:0.1.0-cuda --build-arg VARIANT=worker \
#     --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .
#
# Both have the same Python, because Ray refuses nodes that differ in that. CUDA's libraries come with torch, so
# of NVIDIA's images the smallest will do. Put digests behind the tags (@sha256:…) as your registry has them.
# No model is in it, and no secret goes into it.

ARG BASE=debian:12.12-slim
ARG UV=ghcr.io/astral-sh/uv:0.13.9

FROM ${UV} AS uv

FROM ${BASE} AS build
ARG VARIANT=head
ARG PYTHON=3.11.18
# A mirror of yours instead, where the internet isn't.
ARG INDEX=
ARG PYTHON_MIRROR=https://github.com/astral-sh/python-build-standalone/releases/download
ENV UV_DEFAULT_INDEX=${INDEX} \
    UV_PYTHON_INSTALL_MIRROR=${PYTHON_MIRROR} \
    UV_PYTHON_INSTALL_DIR=/opt/python \
    UV_PROJECT_ENVIRONMENT=/opt/crynux-cluster \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1
COPY --from=uv /uv /usr/local/bin/uv
RUN uv python install "${PYTHON}" && uv venv --python "${PYTHON}" /opt/crynux-cluster
WORKDIR /src
# First what seldom changes.
COPY requirements/${VARIANT}.txt requirements.txt
RUN uv pip install --python /opt/crynux-cluster --no-deps --require-hashes -r requirements.txt
COPY pyproject.toml README.md serve_app.py ./
COPY cluster/ cluster/
COPY actors/ actors/
RUN uv pip install --python /opt/crynux-cluster --no-deps --no-build-isolation .

FROM ${BASE}
ARG VARIANT=head
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="crynux-cluster" \
      org.opencontainers.image.description="A GPU cluster that serves the Crynux network under one key" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      io.crynux-cluster.variant="${VARIANT}"
# For what is asked by TLS with the system's certificates.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/crynux-cluster /opt/crynux-cluster
# Also where a login shell looks, which KubeRay may be told to use. The folders hold nothing but what is mounted in
# them, and whichever user the container is run as must come through.
RUN ln -s /opt/crynux-cluster/bin/python /opt/crynux-cluster/bin/ray /opt/crynux-cluster/bin/crynux-cluster \
        /usr/local/bin/ \
    && (getent passwd 1000 || useradd --uid 1000 --user-group --home-dir /tmp --shell /usr/sbin/nologin crynux) \
    && install --directory --owner=1000 --group=1000 --mode=0755 /etc/crynux-cluster /var/lib/crynux-cluster
ENV PATH=/opt/crynux-cluster/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    PROMETHEUS_DISABLE_CREATED_SERIES=true
USER 1000:1000
WORKDIR /tmp
EXPOSE 8000
STOPSIGNAL SIGTERM
# Docker and Compose ask this; Kubernetes has probes of its own.
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m --retries=20 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
ENTRYPOINT ["crynux-cluster"]
CMD ["--help"]
