"""Whether `huggingface_hub` and transformers take what `muster snapshot serve` gives.

    serve_snapshot.py MUSTER RUN_DIR

Serves the checkpoints of a run, downloads the newest version into a cache of links and the first into a plain folder, loads
both with transformers, and has `muster snapshot verify` check each, before and after one bit of its weights was flipped.
"""

import os
import pathlib
import subprocess
import sys
import tempfile


def main() -> None:
    muster, run_dir = (str(pathlib.Path(word).resolve()) for word in sys.argv[1:3])
    words = [muster, "snapshot", "serve", "--run", run_dir, "--listen", "127.0.0.1:0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as gateway:
        try:
            line = gateway.stdout.readline()
            run, endpoint = line.split()[1], line.split(" on ")[1].split(",")[0]
            with tempfile.TemporaryDirectory() as place:
                check(muster, run_dir, run, endpoint, place)
        finally:
            gateway.terminate()


def check(muster: str, run_dir: str, run: str, endpoint: str, place: str) -> None:
    # Read when the libraries are imported.
    os.environ["HF_HOME"] = place
    os.environ["HF_ENDPOINT"] = endpoint
    import torch
    from huggingface_hub import HfApi, snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    newest = HfApi().model_info(f"muster/{run}", revision="latest")
    print(f"{endpoint}: {run} {newest.sha}, {len(newest.siblings)} files")
    linked = snapshot_download(f"muster/{run}", revision="latest")
    assert pathlib.Path(linked).name == newest.sha, linked
    plain = snapshot_download(run, revision="v0", local_dir=os.path.join(place, "plain"))
    for folder in (linked, plain):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokens = torch.tensor([tokenizer.encode("1+2=")])
        with torch.no_grad():
            logits = model(tokens).logits
        assert torch.isfinite(logits).all()
        print(f"{folder}: {sum(p.numel() for p in model.parameters())} parameters, logits {tuple(logits.shape)}")
        verify = [muster, "snapshot", "verify", folder, "--run", run_dir]
        subprocess.run(verify, check=True)
        weights = pathlib.Path(folder, "model.safetensors")
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.resolve().write_bytes(content)
        refused = subprocess.run(verify, stderr=subprocess.PIPE, text=True)
        print(refused.stderr.strip().splitlines()[-1])
        assert refused.returncode == 1 and "model.safetensors" in refused.stderr
    print("ok")


if __name__ == "__main__":
    main()
