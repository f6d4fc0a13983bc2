# An image with all commands and rules, at the versions of constraints.txt; apptainer.def is the same for Apptainer.
#   docker build -t memdec .                                      # for CPUs
#   docker build -t memdec:gpu --build-arg EXTRAS=gpu,cluster .   # with faiss for GPUs
# pip may need settings of yours, for example a mirror, a folder with wheels, or the page with torch builds for CPUs (the
# usual ones bring gigabytes of CUDA). A secret mount lends it that file without a trace in the image:
#   docker build -t memdec --secret id=pip,src=pip.conf .
FROM python:3.12-slim

# The faiss for CPUs or that for GPUs, and the executors of clusters.
ARG EXTRAS=cpu,cluster

WORKDIR /opt/memdec
# torch first: it is the largest layer, and changes least.
COPY constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml README.md LICENSE memdec_hook.py memdec_hook.pth Snakefile environment.yml ./
COPY memdec memdec
COPY harness_tasks harness_tasks
COPY workflow workflow
COPY config config
COPY profiles profiles
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install --no-cache-dir -c constraints.txt -e ".[${EXTRAS}]"

# Any user may run it (`docker run --user`): what is only cached goes where everyone may write.
ENV XDG_CACHE_HOME=/tmp/cache NUMBA_CACHE_DIR=/tmp/cache/numba MPLCONFIGDIR=/tmp/cache/matplotlib
RUN useradd --create-home --uid 1000 memdec && mkdir /work && chown memdec /work
USER memdec
WORKDIR /work
CMD ["memdec", "--help"]
