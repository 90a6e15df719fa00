"""``python -m benchmarks.plain_server CHECKPOINT PORT``: the handler that one writes by hand, one request at a time."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI, Request

from mnist_lit.datasets.pictures import fit_pictures
from mnist_lit.engine.images import read_picture
from mnist_lit.engine.project import Project
from mnist_lit.engine.serve import open_checkpoint

_, path, port = sys.argv
served = open_checkpoint(Project("mnist_lit"), Path(path), [])
model, fit = served.predict, fit_pictures(served.data)
app = FastAPI()


@app.post("/predict")
async def predict(request: Request) -> dict[str, float]:
    """Probabilities of one image: an image file, or JSON with its pixels."""
    body = await request.body()
    if request.headers["content-type"] == "application/json":
        pixels = np.array(json.loads(body)["images"], np.uint8)  # (1, 28, 28)
    else:
        pixels, _ = read_picture(io.BytesIO(body), 1, (28, 28), fit)
    return dict(zip(served.classes or [], model(pixels[None])[0].tolist(), strict=True))


uvicorn.run(app, port=int(port), log_level="warning")
