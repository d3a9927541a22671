#!/usr/bin/env python3
"""Runs test programs that Cargo built on one device, two at a time, and adds up what they say.

    cargo test --no-run --features wgpu --message-format=json > built.json
    scripts/run_tests.py wgpu < built.json

Cargo runs one program after the other; on a software Vulkan most of the time goes into compiling kernels, on one
thread in each. Where a test fails, its program's output is printed whole and the exit status is 1.
"""

import concurrent.futures
import json
import os
import pathlib
import re
import subprocess
import sys
import time

# The longest begin first, so that none of them is left to run alone.
LONGEST = ["families", "finetune", "inits", "training", "portable", "peft", "own_model"]
# These name no device, and say nothing of one.
OF_NO_DEVICE = ["gguf", "lora_derive", "lora_flex", "lora_train", "memory", "packages", "sampling"]
# Without it, libtorch's matrix products round otherwise from one call to the next, with where their arrays lie in
# memory, and tests compare bits. STRICT: with any number of threads.
REPRODUCIBLE = {"MKL_CBWR": "AUTO,STRICT"}
# Trains seven times; on a software Vulkan for longer than all the rest.
TOO_LONG = {"wgpu": ["inits"], "vulkan": ["inits"]}
RESULT = re.compile(r"^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored", re.MULTILINE)


def programs(lines, left_out):
    """The test programs of Cargo's messages but for those left out, with the folder of each one's package."""
    found = {}
    for line in lines:
        message = json.loads(line)
        if message.get("reason") == "compiler-artifact" and message["profile"]["test"] and message["executable"]:
            if message["target"]["name"] in OF_NO_DEVICE + left_out:
                continue
            found[message["executable"]] = (message["target"]["name"], pathlib.Path(message["manifest_path"]).parent)
    order = {name: place for place, name in enumerate(LONGEST)}
    return sorted(found.items(), key=lambda item: order.get(item[1][0], len(order)))


def run(program, name, folder, device):
    start = time.monotonic()
    # `timeout` ends with 124 after an hour, and what was printed until then is kept.
    done = subprocess.run(
        ["timeout", "3600", program], cwd=folder, env={**REPRODUCIBLE, **os.environ, "LORA_DEVICE": device},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )
    counts = [tuple(map(int, result)) for result in RESULT.findall(done.stdout)]
    return name, folder.name, done, [sum(column) for column in zip(*counts)], time.monotonic() - start


def main():
    if len(sys.argv) != 2:
        sys.exit("run_tests: expected a device's name, and Cargo's messages on standard input")
    device = sys.argv[1]
    left_out = TOO_LONG.get(device.split(":")[0], [])
    tests = programs(sys.stdin, left_out)
    if not tests:
        sys.exit("run_tests: expected test programs in Cargo's messages, found none")
    total, failed = [0, 0, 0], []
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        runs = [pool.submit(run, program, name, folder, device) for program, (name, folder) in tests]
        for finished in concurrent.futures.as_completed(runs):
            name, package, done, counts, seconds = finished.result()
            if done.returncode != 0 or not counts:
                failed.append(f"{package} {name}")
                print(done.stdout)
            total = [before + more for before, more in zip(total, counts or [0, 0, 0])]
            told = "{} passed, {} failed, {} ignored".format(*counts) if counts else "no result"
            print(f"{device}: {package} {name}: {told} ({seconds:.0f} s)", flush=True)
    print("{}: {} passed, {} failed, {} ignored".format(device, *total))
    if left_out:
        print(f"{device}: left out, for they take too long: {', '.join(left_out)}")
    if failed:
        sys.exit(f"run_tests: failed on {device}: {', '.join(failed)}")


if __name__ == "__main__":
    main()
