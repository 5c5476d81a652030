# The package with CUDA code for every supported GPU, built where no GPU is; docs/install.md.
#
#     docker build -t sligru .
#     docker run --rm --gpus all sligru python3 -m sb_fast_sligru.info

FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
# A pair that works: SpeechBrain imports torchaudio, which wants torch's CUDA version.
RUN pip install --no-cache-dir torch==2.11.0 torchaudio==2.11.0 setuptools wheel ninja
COPY . /src
# FORCE_CUDA: an image without CUDA code would be found out on the cluster.
RUN FORCE_CUDA=1 pip install --no-cache-dir --no-build-isolation "/src[recipes]"

# torch brings CUDA's libraries; the driver is the host's.
FROM ubuntu:24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH
CMD ["python3", "-m", "sb_fast_sligru.info"]
