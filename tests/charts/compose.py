#!/usr/bin/python3
"""What deploy/compose.yaml promises.

    compose.py asserts FILE     says each promise that does not hold, and ends with 1
    compose.py prepare FILE     prints the script that makes keys and configurations
"""

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


def main():
    command, path = sys.argv[1:]
    with open(path) as text:
        file = yaml.safe_load(text)
    if command == "prepare":
        print(file["configs"]["prepare"]["content"].replace("$$", "$"))
        return
    found = list(faults(file))
    for fault in found:
        print(f"{path}: {fault}", file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
