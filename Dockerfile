# deltamux on an NVIDIA GPU. PyTorch's Linux wheels bring their own CUDA libraries: the machine
# needs only the driver and the container toolkit. Build and run:
#
#   docker build -t deltamux .
#   docker run --gpus all -p 8000:8000 -p 9090:9090 -v /path/to/model:/model:ro deltamux --model /model
#
# Without a GPU, leave out `--gpus all`. docs/operations.md says what else a container needs.

FROM python:3.12-slim AS build
WORKDIR /build
RUN python -m venv /opt/deltamux
ENV PATH=/opt/deltamux/bin:$PATH PIP_NO_CACHE_DIR=1
# The largest layer changes with the constraints only.
COPY constraints.txt .
RUN pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY kernels kernels
RUN pip install -c constraints.txt .

FROM python:3.12-slim
# Triton compiles its launchers at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 65532 --create-home deltamux
COPY --from=build /opt/deltamux /opt/deltamux
ENV PATH=/opt/deltamux/bin:$PATH \
    DELTAMUX_HOST=0.0.0.0 \
    DELTAMUX_LOG_FORMAT=json
USER 65532:65532
WORKDIR /home/deltamux
EXPOSE 8000 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=5m CMD ["deltamux", "health"]
ENTRYPOINT ["deltamux", "serve"]
