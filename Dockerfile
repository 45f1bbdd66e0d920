# docker build -t cisc-r . && docker run --gpus all --shm-size 8g -v DATA:/cisc-r/data cisc-r make demo
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends make git && rm -rf /var/lib/apt/lists/*
WORKDIR /cisc-r
COPY requirements.txt requirements-dev.txt Makefile ./
RUN make .venv/dev.stamp
COPY . .
ENV PATH=/cisc-r/.venv/bin:$PATH
CMD ["make", "demo"]
# make test runs the tests.
