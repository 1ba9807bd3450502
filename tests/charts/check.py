#!/usr/bin/python3
"""What the charts and what they render promise, and pods laid out as the kubelet would.

    check.py asserts CHART RENDERED                   the promises; says each one that does not hold, and ends with 1
    check.py values CHART                             that its schema knows the values of values.yaml, and no others
    check.py layout CHART RENDERED CAPONIER DIR       the files of the pod below DIR, as they would be below /, with keys and
                                                      certificates made on the way; prints the path of the configuration
    check.py manifests CHART RENDERED                 what a cluster without the Prometheus operator knows, as one JSON list
    check.py pod CHART RENDERED                       a pod of the set, as JSON
"""

import json
import os
import re
import subprocess
import sys

import yaml

PROGRAM = {"caponier-agent": "agent", "caponier-gateway": "gateway", "caponier-proxy": "proxy"}


def of_kind(documents, kind):
    return [each for each in documents if each["kind"] == kind]


def one(documents, kind):
    found = of_kind(documents, kind)
    assert len(found) == 1, f"{len(found)} of kind {kind}"
    return found[0]


def matches(selector, labels):
    return selector and all(labels.get(key) == value for key, value in selector.items())


class Check:
    def __init__(self, chart, text):
        self.chart, self.program, self.text = chart, PROGRAM[chart], text
        self.documents = [each for each in yaml.safe_load_all(text) if each]
        self.faults = []
        self.set = one(self.documents, "StatefulSet")
        self.template = self.set["spec"]["template"]
        self.pod = self.template["spec"]
        self.container = self.pod["containers"][0]
        self.config = one([each for each in of_kind(self.documents, "ConfigMap") if f"{self.program}.toml" in each["data"]], "ConfigMap")
        self.toml = self.config["data"][f"{self.program}.toml"]

    def want(self, what, holds):
        if not holds:
            self.faults.append(what)

    def run(self):
        for each in [self.nothing_secret, self.pod_security, self.files, self.stopping, self.probes, self.services, self.network, self.disruption, self.scaling, self.watching]:
            each()
        return self.faults

    def nothing_secret(self):
        kinds = {each["kind"] for each in self.documents}
        known = {"ConfigMap", "StatefulSet", "Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler", "ServiceMonitor", "PrometheusRule"}
        self.want(f"renders {kinds - known}, which is not looked at here", kinds <= known)
        self.want("has a private key in it", "PRIVATE KEY" not in self.text)
        self.want("is in another namespace", all(each["metadata"].get("namespace") == "space" for each in self.documents))

    def pod_security(self):
        """As of Pod Security's level restricted, and more."""
        pod, want = self.pod, self.want
        context = pod["securityContext"]
        openshift = "runAsUser" not in context
        want("runAsNonRoot", context.get("runAsNonRoot") is True)
        want("seccompProfile", context.get("seccompProfile") == {"type": "RuntimeDefault"})
        want("user, group and fsGroup all or none", len({"runAsUser", "runAsGroup", "fsGroup"} & set(context)) in (0, 3))
        want("a user that is not root", openshift or (context["runAsUser"] > 0 and context["fsGroup"] > 0))
        want("no token of a service account", pod.get("automountServiceAccountToken") is False)
        want("a service account without one", all(each["automountServiceAccountToken"] is False for each in of_kind(self.documents, "ServiceAccount")))
        want("no variables from Services", pod.get("enableServiceLinks") is False)
        want("nothing of the host", not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC", "initContainers", "ephemeralContainers")))
        want("one container", len(pod["containers"]) == 1)
        for container in pod["containers"]:
            inner = container["securityContext"]
            want("allowPrivilegeEscalation", inner.get("allowPrivilegeEscalation") is False)
            want("readOnlyRootFilesystem", inner.get("readOnlyRootFilesystem") is True)
            want("no capabilities", inner.get("capabilities") == {"drop": ["ALL"]})
            want("not privileged", not inner.get("privileged"))
            want("a limit of memory, and requests", container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"])
            want("no port of the host", not any("hostPort" in port for port in container.get("ports", [])))
            want("no port below 1024", all(port["containerPort"] >= 1024 for port in container.get("ports", [])))
            want("no secrets in the environment", not any("valueFrom" in each for each in container["env"]))

    def files(self):
        want = self.want
        volumes = {each["name"]: each for each in self.pod["volumes"]}
        want("volumes of one name", len(volumes) == len(self.pod["volumes"]))
        kinds = {kind for each in volumes.values() for kind in each if kind != "name"}
        want(f"volumes of kinds {kinds}", kinds <= {"configMap", "secret", "emptyDir", "persistentVolumeClaim"})
        for name, volume in volumes.items():
            if "secret" in volume:
                want(f"{name} is readable by others", volume["secret"].get("defaultMode") == 0o400)
        claimed = {each["metadata"]["name"] for each in self.set["spec"].get("volumeClaimTemplates", [])}
        mounted = [each["name"] for each in self.container["volumeMounts"]]
        want("what is mounted is what there is", sorted(mounted) == sorted(volumes.keys() | claimed))
        places = [each["mountPath"] for each in self.container["volumeMounts"]]
        want("one thing in one place", len(set(places)) == len(places))
        writable = {each["mountPath"] for each in self.container["volumeMounts"] if not each.get("readOnly")}
        want(f"only trail and sockets can be written, not {writable}", writable == {"/var/log/caponier", "/run/caponier"})
        named = {os.path.dirname(path) for path in re.findall(r'"(/etc/caponier/[^"]+/[^"]+)"', self.toml)}
        missing = {each for each in named if each not in places}
        want(f"the configuration names files in {missing}, where nothing is mounted", not missing)

    def stopping(self):
        drain = int(re.search(r"^drain_s = (\d+)$", self.toml, re.M).group(1))
        grace = self.pod["terminationGracePeriodSeconds"]
        pause = self.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        self.want(f"a grace period of {grace} s for {pause} and a drain of {drain}", grace >= drain + pause + 60)
        self.want("what a restart needs rolls the pods", re.fullmatch("[0-9a-f]{64}", self.template["metadata"]["annotations"]["caponier/restart"]))

    def probes(self):
        metrics = "[metrics]" in self.toml
        for name, path in [("startupProbe", "livez"), ("livenessProbe", "livez"), ("readinessProbe", "readyz")]:
            probe = self.container[name]
            if metrics:
                self.want(f"{name} by HTTP", probe.get("httpGet") == {"path": f"/{path}", "port": "metrics"})
            else:
                command = probe["exec"]["command"]
                self.want(f"{name} by command", command[:4] == ["/usr/bin/caponier", "health", "--socket", "/run/caponier/health.sock"])
        self.want("a socket for probes", '[health]\nsocket = "/run/caponier/health.sock"' in self.toml)

    def services(self):
        labels = self.template["metadata"]["labels"]
        self.want("the set selects its pods", matches(self.set["spec"]["selector"]["matchLabels"], labels))
        names = {each["metadata"]["name"] for each in of_kind(self.documents, "Service")}
        self.want("the set's Service", self.set["spec"]["serviceName"] in names)
        ports = {port["name"] for port in self.container.get("ports", [])}
        for service in of_kind(self.documents, "Service"):
            selector = dict(service["spec"]["selector"])
            pod = selector.pop("statefulset.kubernetes.io/pod-name", None)
            name = service["metadata"]["name"]
            self.want(f"{name} selects the pods", matches(selector, labels))
            self.want(f"{name} is of pod {pod}", pod is None or name == pod)
            for port in service["spec"].get("ports", []):
                self.want(f"{name}: nothing listens at {port['targetPort']}", port["targetPort"] in ports)

    def network(self):
        policy = one(self.documents, "NetworkPolicy")["spec"]
        labels = self.template["metadata"]["labels"]
        self.want("the policy is for the pods", matches(policy["podSelector"]["matchLabels"], labels))
        self.want("both ways", sorted(policy["policyTypes"]) == ["Egress", "Ingress"])
        ports = {port["containerPort"] for port in self.container.get("ports", [])}
        allowed = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        self.want(f"lets {allowed} in, and {ports} are there", allowed == ports)
        for rule in policy["egress"]:
            self.want("a way out to every port", rule.get("ports"))
            self.want("a way out to everybody and DNS alike", rule.get("to"))
        out = {(block["ipBlock"]["cidr"], port["port"]) for rule in policy["egress"] for block in rule["to"] if "ipBlock" in block for port in rule["ports"]}
        everywhere = {port for cidr, port in out if cidr in ("0.0.0.0/0", "::/0")}
        if self.program == "agent":
            self.want("an agent listens on nothing unless it is told to", policy["ingress"] == [] or "[metrics]" in self.toml or "[listen]" in self.toml)
            self.want(f"out to everywhere on {everywhere}", everywhere <= {443})
            wanted = set()
            for rule in re.split(r"\n\n", self.toml):
                if rule.startswith("[[organisation.allow]]"):
                    networks = re.findall(r'"([^"]+/\d+)"', rule)
                    wanted |= {(network, int(port)) for network in networks for port in re.findall(r"^ports = \[(\d+)", rule, re.M)}
            self.want(f"what the rules allow is let out: {wanted - out}", wanted <= out)
        if self.program == "gateway":
            self.want("a gateway dials nobody", policy["egress"] == [])
        if self.program == "proxy":
            self.want("clients come from somewhere", all(rule["from"] for rule in policy["ingress"]))

    def disruption(self):
        budget = one(self.documents, "PodDisruptionBudget")["spec"]
        self.want("the budget is for the pods", matches(budget["selector"]["matchLabels"], self.template["metadata"]["labels"]))
        self.want("a budget that lets nodes be drained", budget.get("maxUnavailable") and "minAvailable" not in budget)
        for constraint in self.pod["topologySpreadConstraints"]:
            self.want("spread among its own", matches(constraint["labelSelector"]["matchLabels"], self.template["metadata"]["labels"]))

    def scaling(self):
        scalers = of_kind(self.documents, "HorizontalPodAutoscaler")
        self.want("either a number of replicas or a scaler", bool(scalers) != ("replicas" in self.set["spec"]))
        for scaler in scalers:
            spec = scaler["spec"]
            self.want("it scales the set", spec["scaleTargetRef"]["name"] == self.set["metadata"]["name"])
            down = spec["behavior"]["scaleDown"]
            drain = int(re.search(r"^drain_s = (\d+)$", self.toml, re.M).group(1))
            self.want("gateways go one by one, each after the drain of the last", down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": max(60, min(drain, 1800))}])
            own = [each for each in of_kind(self.documents, "Service") if "statefulset.kubernetes.io/pod-name" in each["spec"]["selector"]]
            self.want("an address for each", len(own) == spec["maxReplicas"])

    def watching(self):
        for rule in of_kind(self.documents, "PrometheusRule"):
            self.want("alerts", rule["spec"]["groups"][0]["rules"])
        for monitor in of_kind(self.documents, "ServiceMonitor"):
            self.want("a job that the alerts know", monitor["spec"]["jobLabel"] == "app.kubernetes.io/name")


def layout(check, caponier, root):
    """As the kubelet does it: files in a folder with a date, and links to them."""
    certificates = {}

    def content(name):
        if name.endswith((".crt", ".pem")) or name == "tls.key":
            if not certificates:
                subprocess.run(
                    ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "90", "-subj", "/CN=x", "-addext", "subjectAltName=DNS:x,URI:caponier://acme/agents/prod-eu", "-keyout", f"{root}/pair.key", "-out", f"{root}/pair.crt"],
                    check=True, capture_output=True)
                certificates.update(key=open(f"{root}/pair.key").read(), crt=open(f"{root}/pair.crt").read())
            return certificates["key" if name == "tls.key" else "crt"]
        if name.endswith(".key"):
            path = f"{root}/made-{name}"
            if not os.path.exists(path):
                subprocess.run([caponier, "keys", "generate", "--output", path], check=True, capture_output=True)
            return open(path).read()
        return "user:password\n"

    def place(folder, files, mode):
        data = f"{root}{folder}/..2026_11_21_20_00_00.1"
        os.makedirs(data, exist_ok=True)
        for path, text in files.items():
            os.makedirs(os.path.dirname(f"{data}/{path}"), exist_ok=True)
            with open(f"{data}/{path}", "w") as file:
                file.write(text)
            os.chmod(f"{data}/{path}", mode)
        os.symlink(os.path.basename(data), f"{root}{folder}/..data")
        for first in {path.split("/")[0] for path in files}:
            os.symlink(f"..data/{first}", f"{root}{folder}/{first}")

    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(check.documents, "ConfigMap")}
    volumes = {each["name"]: each for each in check.pod["volumes"]}
    for mount in check.container["volumeMounts"]:
        folder, volume = mount["mountPath"], volumes.get(mount["name"], {})
        named = {os.path.basename(path): content(os.path.basename(path)) for path in re.findall(r'"(/etc/caponier/[^"]+)"', check.toml) if os.path.dirname(path) == folder}
        if "secret" in volume:
            place(folder, named, 0o400)
        elif "configMap" in volume:
            data = maps.get(volume["configMap"]["name"])
            items = volume["configMap"].get("items")
            files = named if data is None else {item["path"]: data[item["key"]] for item in items} if items else data
            place(folder, files, 0o644)
        elif "persistentVolumeClaim" in volume:
            os.makedirs(f"{root}{folder}/organisations")
        else:
            os.makedirs(f"{root}{folder}", exist_ok=True)
    return f"/etc/caponier/config/{check.program}.toml"


def unlike(values, schema, path=""):
    """Where the two do not know the same values."""
    properties = schema.get("properties")
    if not isinstance(values, dict) or properties is None:
        return
    for key in sorted(set(values) ^ (set(properties) - {"global"})):
        yield f"{path}{key}: only {'values.yaml' if key in values else 'values.schema.json'} has it"
    if schema.get("additionalProperties") is not False:
        yield f"{path or 'the root'}: other values are taken, and do nothing"
    for key in set(values) & set(properties):
        yield from unlike(values[key], properties[key], f"{path}{key}.")


def main():
    if sys.argv[1] == "values":
        chart = sys.argv[2]
        found = list(unlike(yaml.safe_load(open(f"{chart}/values.yaml")), json.load(open(f"{chart}/values.schema.json"))))
        for each in found:
            print(f"{chart}: {each}", file=sys.stderr)
        sys.exit(1 if found else 0)
    command, chart, rendered = sys.argv[1:4]
    check = Check(chart, open(rendered).read())
    if command == "layout":
        print(layout(check, *sys.argv[4:6]))
        return
    if command == "manifests":
        items = [each for each in check.documents if not each["apiVersion"].startswith("monitoring.coreos.com/")]
        print(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        return
    if command == "pod":
        # The set's controller would add the volume that it claims.
        claimed = [{"name": each["metadata"]["name"], "persistentVolumeClaim": {"claimName": "claim"}} for each in check.set["spec"].get("volumeClaimTemplates", [])]
        spec = {**check.pod, "volumes": check.pod["volumes"] + claimed}
        print(json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "namespace": "space", "labels": check.template["metadata"]["labels"]}, "spec": spec}))
        return
    faults = check.run()
    for fault in faults:
        print(f"{rendered}: {fault}", file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
