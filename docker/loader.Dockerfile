# A node, and preprocessing, without torch or a compiler. Build it in the repository's root:
#
#     docker build --file docker/loader.Dockerfile --tag loader-service .
#
# The first stage equals trainer.Dockerfile's word for word, so that the two images share its layers. On a machine with a mirror
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

# The requirements of pyproject.toml; rebuilt only if that file or a pinned version changes.
FROM compiler AS packages
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
COPY pyproject.toml ./
RUN python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt --build-constraint constraints.txt -r requirements.txt \
    && pip uninstall --yes setuptools pip

# The project itself, in a folder of its own: a change of code rebuilds this stage and the last layers of the last stage.
FROM compiler AS code
COPY pyproject.toml README.md LICENSE ./
COPY loader_service loader_service
COPY trainer trainer
COPY tools tools
RUN pip install --no-cache-dir --no-deps --no-index --no-build-isolation --target /opt/app .

# The wheels that the sample photographs are cut from.
FROM compiler AS photographs
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
COPY tools/photographs.py ./
RUN python -c 'import photographs; print(*{p.package for p in photographs.PHOTOGRAPHS})' > wanted \
    && pip download --no-cache-dir --no-deps --only-binary=:all: --dest /opt/samples/wheels $(cat wanted)

FROM ${BASE} AS node
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libjpeg62-turbo \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin loader \
    && install --directory --owner loader --group loader /data /images /keys
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /opt/pillow-avx2 /opt/pillow-avx2
COPY docker/entrypoint.sh /usr/local/bin/
COPY --from=code /opt/app /opt/app
ENV PATH=/opt/app/bin:/opt/venv/bin:$PATH PYTHONPATH=/opt/app PYTHONUNBUFFERED=1 HOME=/tmp \
    LOADER_SERVICE_START_DATA=/data
USER 10001:10001
WORKDIR /tmp
EXPOSE 5555 9555
STOPSIGNAL SIGTERM
# For a node with keys, LOADER_SERVICE_STATUS_SERVER_KEY and LOADER_SERVICE_STATUS_CLIENT_KEY name the key files.
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=3 \
    CMD ["loader-service", "status", "--interval", "0", "--timeout", "5"]
ENTRYPOINT ["entrypoint.sh"]
CMD ["loader-service", "start"]

# The same image with the photographs, for users without images of their own.
FROM node AS preprocess
COPY --from=photographs /opt/samples /opt/samples
HEALTHCHECK NONE
CMD ["loader-service", "preprocess", "/images", "/data"]

# The default target.
FROM node
