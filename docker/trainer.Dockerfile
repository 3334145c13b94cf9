# The trainer, with torch's CUDA build, or with the CPU build if TORCH_INDEX names its index. Build it in the repository's
# root:
#
#     docker build --file docker/trainer.Dockerfile --tag loader-service-trainer .
#     docker build --file docker/trainer.Dockerfile --tag loader-service-trainer:cpu \
#         --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
#
# The first stage equals loader.Dockerfile's word for word, so that the two images share its layers. On a machine with a mirror
# of the package index, set the build arguments PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, which pip reads.
ARG BASE=python:3.11-slim-bookworm

# The compiler. The official images contain Python's headers; for other bases Debian's package brings them.
FROM ${BASE} AS compiler
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libjpeg62-turbo-dev zlib1g-dev \
    && headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && { [ -e "$headers/Python.h" ] || apt-get install --yes --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
WORKDIR /build
COPY constraints.txt docker/install-pillow.sh ./
RUN python -m venv /opt/venv \
    && pip install --no-cache-dir --constraint constraints.txt pip \
    && pip install --no-cache-dir --constraint constraints.txt setuptools
RUN ./install-pillow.sh /opt/pillow-avx2

# The requirements of pyproject.toml, with its extra `trainer`; rebuilt only if that file or a pinned version changes. A
# local version such as 2.13.0+cpu ranks above 2.13.0, so TORCH_INDEX takes precedence.
FROM compiler AS packages
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG TORCH_INDEX
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml ./
RUN python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        print(*p["dependencies"], *p["optional-dependencies"]["trainer"], sep="\n")' > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --build-constraint constraints.txt -r requirements.txt \
    && pip uninstall --yes setuptools pip

# The project itself, in a folder of its own: a change of code rebuilds this stage and the last layers of the last stage.
FROM compiler AS code
COPY pyproject.toml README.md LICENSE ./
COPY loader_service loader_service
COPY trainer trainer
COPY tools tools
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation --target /opt/app .

# The user has the same number as the loader's: only its owner can open shared memory. --compile and --fused-norm compile at run
# time, with a C++ compiler for CPUs, a C compiler for the launchers of GPU kernels, and Python's headers; /cache keeps the
# results. It must not be on a file system without code (noexec), as Docker's tmpfs is.
FROM ${BASE}
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libjpeg62-turbo g++ \
    && headers=$(python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
    && { [ -e "$headers/Python.h" ] || apt-get install --yes --no-install-recommends python3-dev; } \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin loader \
    && install --directory --owner loader --group loader /data /keys /runs /cache
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/pillow-avx2 /opt/pillow-avx2
COPY docker/entrypoint.sh /usr/local/bin/
COPY --from=code /opt/app /opt/app
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/app PYTHONUNBUFFERED=1 HOME=/tmp
ENV TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
ENTRYPOINT ["entrypoint.sh", "trainer"]
CMD ["run", "--resume", "auto", "--run", "/runs/alexnet"]
