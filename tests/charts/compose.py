#!/usr/bin/python3
"""What deploy/compose.yaml promises.

    compose.py asserts FILE     says each promise that does not hold, and ends with 1
    compose.py read FILE JSON   that Docker Compose understood of it what is meant: JSON is its answer to `config`
    compose.py prepare FILE     prints the script that makes keys and configurations
"""

import json
import os
import sys

import yaml

# Who may see whose files.
VOLUMES = {
    "prepare": {"gateway", "agent", "client", "password"},
    "gateway": {"gateway", "gateway-trail"},
    "agent": {"agent", "agent-trail"},
    "client": {"client"},
    "psql": {"password"},
    "db": {"password", "db"},
}
NETWORKS = {"prepare": set(), "gateway": {"outside", "border"}, "agent": {"border", "inside"}, "client": {"outside"}, "psql": set(), "db": {"inside"}}


def faults(file):
    services = file["services"]
    if set(services) != set(VOLUMES):
        yield f"services are {set(services)}"
    for name, network in file["networks"].items():
        if network.get("internal") is not True:
            yield f"network {name} leads elsewhere"
    for name, service in services.items():
        for key, value in {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}.items():
            if service.get(key) != value:
                yield f"{name}: {key} is {service.get(key)}"
        for key in ("privileged", "ports", "pid", "ipc", "devices", "env_file"):
            if key in service:
                yield f"{name} has {key}"
        if service.get("network_mode") not in (None, "none", "service:client"):
            yield f"{name} is in {service['network_mode']}"
        if set(service.get("networks", [])) != NETWORKS[name]:
            yield f"{name} is in {service.get('networks')}"
        mounted = [each for each in service.get("volumes", []) if isinstance(each, str)]
        if {each.split(":")[0] for each in mounted} != VOLUMES[name]:
            yield f"{name} has {mounted}"
        if any(each.startswith(("/", ".", "~")) for each in mounted):
            yield f"{name} has something of the host"
        if any("PASSWORD" in key and not key.endswith("_FILE") for key in service.get("environment", {})):
            yield f"{name} has a password in its environment"
        if name in ("gateway", "agent", "client") and (service.get("user") != "65532:65532" or service.get("cap_add")):
            yield f"{name} is more than nobody"


def misread(file, model, path):
    services = model["services"]
    if set(services) != set(VOLUMES):
        yield f"services are {set(services)}"
    for kind in ("networks", "volumes"):
        if set(model[kind]) != set(file[kind]):
            yield f"{kind} are {set(model[kind])}"
    if any(each.get("internal") is not True for each in model["networks"].values()):
        yield "a network leads elsewhere"
    if any(each and (each.get("external") or each.get("driver_opts")) for each in model["volumes"].values()):
        yield "a volume is something of the host"
    for name, service in services.items():
        written = file["services"][name]
        for key in ("read_only", "cap_drop", "cap_add", "security_opt", "user", "image", "network_mode", "tmpfs", "profiles", "environment"):
            if service.get(key) != written.get(key):
                yield f"{name}: {key} is {service.get(key)}"
        if set(service.get("networks") or []) != NETWORKS[name]:
            yield f"{name} is in {service.get('networks')}"
        mounted = {each["source"] for each in service.get("volumes", []) if each["type"] != "tmpfs"}
        if mounted != VOLUMES[name] or any(each["type"] not in ("volume", "tmpfs") for each in service.get("volumes", [])):
            yield f"{name} has {service.get('volumes')}"
        for other, condition in service.get("depends_on", {}).items():
            wants = written["depends_on"]
            if other not in services or (isinstance(wants, dict) and condition["condition"] != wants[other]["condition"]):
                yield f"{name} waits for {other} until {condition}"
            if condition["condition"] == "service_healthy" and not services[other].get("healthcheck"):
                yield f"{name} waits for {other}, whose health nobody asks for"
        build = service.get("build")
        if build:
            top = os.path.dirname(os.path.dirname(os.path.abspath(path)))
            if build["context"] != top or not os.path.exists(os.path.join(top, build["dockerfile"])):
                yield f"{name} is built of {build}"
                continue
            stages = [line.split()[-1] for line in open(os.path.join(top, build["dockerfile"])) if line.startswith("FROM ") and " AS " in line]
            if build.get("target", stages[0]) not in stages:
                yield f"{name} is stage {build['target']}, which is none of {stages}"
    script = model["configs"]["prepare"]["content"]
    # `docker compose config` writes '$' twice, as the file has it.
    if file["configs"]["prepare"]["content"].replace("$$", "$") != script.replace("$$", "$"):
        yield "the script that makes keys is another"


def main():
    command, path = sys.argv[1:3]
    with open(path) as text:
        file = yaml.safe_load(text)
    if command == "read":
        with open(sys.argv[3]) as text:
            found = list(misread(file, json.load(text), path))
        for fault in found:
            print(f"{path}, as it is understood: {fault}", file=sys.stderr)
        sys.exit(1 if found else 0)
    if command == "prepare":
        print(file["configs"]["prepare"]["content"].replace("$$", "$"))
        return
    found = list(faults(file))
    for fault in found:
        print(f"{path}: {fault}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
