# Prometheus, Debian's package, on the base of the other images. Build it in the repository's root:
#
#     docker build --file docker/prometheus.Dockerfile --tag loader-service-prometheus .
#
# Its configuration, prometheus.yaml, is mounted, so that a change needs no build.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}
# Its pages use one file of moment-timezone; the 210 MB of source tables of that file are left out.
RUN echo 'path-exclude=/usr/share/javascript/moment-timezone/data/*' > /etc/dpkg/dpkg.cfg.d/moment-timezone \
    && apt-get update \
    && apt-get install --yes --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner 10001 --group 10001 /prometheus
USER 10001:10001
WORKDIR /prometheus
EXPOSE 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=3 \
    CMD ["promtool", "query", "instant", "http://localhost:9090", "vector(1)"]
ENTRYPOINT ["prometheus", "--config.file=/etc/prometheus/prometheus.yml", "--storage.tsdb.path=/prometheus"]
CMD ["--web.listen-address=0.0.0.0:9090", "--storage.tsdb.retention.time=30d"]
