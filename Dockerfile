# apparate-llm on CPUs. docs/serving.md says how to build and run it.
FROM python:3.11-slim-bookworm AS build
# pip must find the CPU build of torch: give its index as --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir -c constraints.txt setuptools \
    && python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' \
    && pip wheel --no-cache-dir --no-deps --no-build-isolation -w dist dist/*.tar.gz
ENV PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/apparate-llm \
    && /opt/apparate-llm/bin/pip install "$(ls dist/*.whl)[cpu]" -c constraints.txt \
    && /opt/apparate-llm/bin/apparate-llm doctor --fix

FROM python:3.11-slim-bookworm
# g++ compiles the model; tcmalloc is preloaded; tini hands signals on, and buries what vLLM's processes leave.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --home-dir /cache apparate
COPY --from=build /opt/apparate-llm /opt/apparate-llm
# Model, compiled code, what the controller learned and Hugging Face's files: everything that is kept is in /cache.
ENV PATH=/opt/apparate-llm/bin:$PATH XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface
USER 1000
WORKDIR /cache
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["tini", "--", "apparate-llm", "serve"]
