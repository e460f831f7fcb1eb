# A server for one model:
#
#   docker build -t dllm .
#   docker run --gpus all -p 127.0.0.1:8000:8000 -v dllm-cache:/cache -e DLLM_API_KEY dllm \
#       model=GSAI-ML/LLaDA-8B-Instruct model.dtype=bfloat16 sampler=threshold cache=dual max_length=4096
#
# What follows the image's name are options of `dllm serve`. Without a GPU leave out --gpus all.
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HOME=/cache
WORKDIR /app
COPY . .
RUN pip install -c constraints.txt '.[serve]' && useradd --create-home dllm && install -d -o dllm /cache
USER dllm
WORKDIR /home/dllm
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --start-period=10m CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"
# The longest time that a container has after `docker stop` must exceed drain: docker stop --time 40.
ENTRYPOINT ["dllm", "serve", "host=0.0.0.0", "port=8000"]
