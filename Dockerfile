# bertlite in a container; CPU by default. For NVIDIA GPUs:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 -t bertlite .
#   docker run --gpus all -v "$PWD:/work" bertlite pretrain config.yaml
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch.compile needs a C++ compiler on CPUs, and Triton a C compiler on GPUs.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/bertlite
COPY pyproject.toml README.md LICENSE ./
COPY bertlite bertlite
COPY scripts/constraints.txt scripts/constraints.txt
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint scripts/constraints.txt ".[finetune]"

WORKDIR /work
ENTRYPOINT ["bertlite"]
