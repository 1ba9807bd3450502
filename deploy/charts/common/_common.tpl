{{/*
What the three charts share: names, the configuration as TOML, the pod, and what stands beside it. Each chart has this file by a
link. What a chart adds is in its own _chart.tpl, under these names:

  chart.config     the configuration, as YAML of the same shape as the TOML
  chart.restart    what of it only a restart takes up, as YAML
  chart.egress     what its NetworkPolicy lets out, as a YAML list
  chart.ingress    what it lets in, as a YAML list
  chart.named      the Secrets and ConfigMaps that its settings name, as {secrets: […], public: […]}
  chart.volumes    its own further volumes, and
  chart.mounts     where they are
  chart.ports      its own ports, as of a container
  chart.mistakes   fails with a word about values that contradict each other
*/}}

{{- define "caponier.program" -}}
{{- trimPrefix "caponier-" .Chart.Name -}}
{{- end -}}

{{- define "caponier.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "caponier.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "caponier.labels" -}}
{{ include "caponier.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/component: {{ include "caponier.program" . }}
app.kubernetes.io/part-of: caponier
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "caponier.metadata" -}}
name: {{ include "caponier.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "caponier.labels" . | nindent 2 }}
{{- end -}}

{{- define "caponier.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (.tag | default $.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* --- the configuration ------------------------------------------------------------------------------- */}}

{{/* A map as TOML. Given: a list of the path so far and the map. What is null is left out. */}}
{{- define "caponier.toml" -}}
{{- $path := index . 0 -}}
{{- $map := index . 1 -}}
{{- range $key := keys $map | sortAlpha }}
{{- $value := index $map $key }}
{{- if not (or (kindIs "invalid" $value) (kindIs "map" $value) (eq (include "caponier.isTables" $value) "yes")) }}
{{ include "caponier.tomlKey" $key }} = {{ include "caponier.tomlValue" (list $key $value) }}
{{- end }}
{{- end }}
{{- range $key := keys $map | sortAlpha }}
{{- $value := index $map $key }}
{{- $bare := include "caponier.tomlKey" $key }}
{{- $name := ternary $bare (printf "%s.%s" $path $bare) (eq $path "") }}
{{- if kindIs "map" $value }}

[{{ $name }}]
{{- include "caponier.toml" (list $name $value) }}
{{- else if eq (include "caponier.isTables" $value) "yes" }}
{{- range $table := $value }}

[[{{ $name }}]]
{{- include "caponier.toml" (list $name $table) }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "caponier.tomlKey" -}}
{{- if regexMatch "^[A-Za-z0-9_-]+$" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{- define "caponier.isTables" -}}
{{- if kindIs "slice" . }}{{ if . }}{{ if kindIs "map" (first .) }}yes{{ end }}{{ end }}{{ end -}}
{{- end -}}

{{/* Helm has every number as a float; the escapes of JSON strings are those of TOML; moments are written without quotes. */}}
{{- define "caponier.tomlValue" -}}
{{- $key := index . 0 -}}
{{- $value := index . 1 -}}
{{- if kindIs "slice" $value -}}
[{{ range $at, $each := $value }}{{ if $at }}, {{ end }}{{ include "caponier.tomlValue" (list $key $each) }}{{ end }}]
{{- else if kindIs "string" $value -}}
{{- if and (has $key (list "not_before" "expires")) (regexMatch "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+(Z|[+-][0-9:]+)$" $value) -}}
{{ $value }}
{{- else -}}
{{ $value | toJson }}
{{- end -}}
{{- else if kindIs "float64" $value -}}
{{- if ne (float64 (int64 $value)) $value -}}
{{- fail (printf "%s is %v: every number of the configuration is a whole one" $key $value) -}}
{{- end -}}
{{ int64 $value }}
{{- else -}}
{{ $value }}
{{- end -}}
{{- end -}}

{{/* What every program's configuration has: trail, log, health and metrics. */}}
{{- define "caponier.config.shared" -}}
{{- $program := include "caponier.program" . -}}
audit:
{{- if eq .Values.audit.to "stdout" }}
  stdout: true
{{- else }}
  file: {{ printf "/var/log/caponier/%s.jsonl" $program }}
{{- end }}
{{- if .Values.audit.signingKey }}
  signing_key: {{ printf "/etc/caponier/keys/%s" .Values.audit.signingKey }}
{{- end }}
log:
  format: {{ .Values.log.format }}
health:
  socket: /run/caponier/health.sock
{{- if .Values.metrics.enabled }}
metrics:
  listen: {{ printf "0.0.0.0:%d" (int .Values.metrics.port) | quote }}
{{- end }}
{{- end -}}

{{/* All of it, with what extraConfig adds, as YAML; guarded against secrets. */}}
{{- define "caponier.config" -}}
{{- $config := mergeOverwrite (include "caponier.config.shared" . | fromYaml) (include "chart.config" . | fromYaml) (deepCopy .Values.extraConfig) -}}
{{- $text := toYaml $config -}}
{{- if contains "PRIVATE KEY" $text -}}
{{- fail "there is a private key among the values: they are kept by Helm and shown to whoever may read its releases. Put it into a Secret (existingSecret), and make a new one, since this one is known by now" -}}
{{- end -}}
{{- if regexMatch "://[^/\"' ]*@" $text -}}
{{- fail "there are credentials in a URL among the values: put them into a Secret (proxy.credentials.existingSecret)" -}}
{{- end -}}
{{- $text -}}
{{- end -}}

{{/*
What a schema cannot say of values, and what a cluster would take, or refuse with other words, or never tell. What a chart adds is
in its chart.mistakes.
*/}}
{{- define "caponier.mistakes" -}}
{{- $config := include "caponier.config" . | fromYaml -}}
{{- if not (regexMatch "^[a-z]" (include "caponier.fullname" .)) -}}
{{- fail (printf "%s cannot be the name of a Service, which begins with a letter: give fullnameOverride" (include "caponier.fullname" .)) -}}
{{- end -}}
{{- if and .Values.audit.signingKey (not .Values.existingSecret) -}}
{{- fail "audit.signingKey is a key of existingSecret, which is not given" -}}
{{- end -}}
{{- if and (or .Values.metrics.serviceMonitor.enabled .Values.metrics.prometheusRule.enabled) (not .Values.metrics.enabled) -}}
{{- fail "metrics.serviceMonitor and metrics.prometheusRule are about metrics, and metrics.enabled is false" -}}
{{- end -}}
{{- range $label, $_ := .Values.podLabels -}}
{{- if hasPrefix "app.kubernetes.io/" $label -}}
{{- fail (printf "podLabels has %s, which is one of those by which pods are found" $label) -}}
{{- end -}}
{{- end -}}
{{- if hasKey .Values.podAnnotations "caponier/restart" -}}
{{- fail "podAnnotations has caponier/restart, by which the chart rolls the pods for what only a restart takes up" -}}
{{- end -}}
{{- range .Values.env -}}
{{- if or (contains "PRIVATE KEY" (toString .value)) (regexMatch "://[^/\"' ]*@" (toString .value)) -}}
{{- fail (printf "env has a private key or credentials in a URL as %s: put them into a Secret" .name) -}}
{{- end -}}
{{- end -}}
{{- $named := include "chart.named" . | fromYaml -}}
{{- $mounted := list -}}
{{- range $named.secrets }}{{ $mounted = append $mounted (printf "/etc/caponier/secrets/%s" .) }}{{ end -}}
{{- range $named.public }}{{ $mounted = append $mounted (printf "/etc/caponier/public/%s" .) }}{{ end -}}
{{- range regexFindAll "/etc/caponier/(secrets|public)/[a-z0-9.-]+" (toYaml $config) -1 | uniq -}}
{{- if not (has . $mounted) -}}
{{- fail (printf "the configuration names files in %s, where nothing is mounted: give %s" . (ternary "extraSecrets" "extraConfigMaps" (contains "/secrets/" .))) -}}
{{- end -}}
{{- end -}}
{{- /* A pod that cannot reach a collector which its trail requires forwards nothing. */}}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.extraEgress) -}}
{{- range $config.audit.sink -}}
{{- if has .kind (list "https" "syslog") -}}
{{- fail (printf "the trail goes to the sink %v, and the NetworkPolicy lets nothing out to it: say where it is in networkPolicy.extraEgress, with its port, and DNS where it has a name" (.name | default "without a name")) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- include "chart.mistakes" . -}}
{{- end -}}

{{- define "caponier.configmap" -}}
{{- include "caponier.mistakes" . -}}
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "caponier.metadata" . | nindent 2 }}
data:
  {{ include "caponier.program" . }}.toml: |
    # Made by the chart {{ .Chart.Name }} of its values. A change is taken up by the running program within minutes of its
    # being applied; what only a restart takes up rolls the pods.
    {{- include "caponier.toml" (list "" (include "caponier.config" . | fromYaml)) | trim | nindent 4 }}
{{- end -}}

{{/* --- the pod ------------------------------------------------------------------------------------------ */}}

{{/* A volume's name is a label: it has no '.', and not the length of a Secret's. */}}
{{- define "caponier.volume" -}}
{{- if and (le (len .) 63) (not (contains "." .)) -}}
{{- . -}}
{{- else -}}
{{- printf "%s-%s" (replace "." "-" . | trunc 50 | trimSuffix "-") (sha256sum . | trunc 12) -}}
{{- end -}}
{{- end -}}

{{- define "caponier.replicas" -}}
{{- .Values.replicas | default 1 | int -}}
{{- end -}}

{{- define "caponier.statefulset" -}}
{{- $program := include "caponier.program" . -}}
{{- $mounts := include "chart.mounts" . -}}
apiVersion: apps/v1
kind: StatefulSet
metadata:
  {{- include "caponier.metadata" . | nindent 2 }}
spec:
  serviceName: {{ include "caponier.fullname" . }}-pods
  {{- if not (and .Values.autoscaling .Values.autoscaling.enabled) }}
  replicas: {{ include "caponier.replicas" . }}
  {{- end }}
  # All at once at the first start and after an outage; an update goes one by one regardless.
  podManagementPolicy: Parallel
  selector:
    matchLabels:
      {{- include "caponier.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "caponier.selector" . | nindent 8 }}
        app.kubernetes.io/part-of: caponier
        {{- with .Values.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      annotations:
        # Of what only a restart takes up; everything else the program follows while it runs.
        caponier/restart: {{ include "chart.restart" . | sha256sum }}
        {{- with .Values.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    spec:
      {{- with .Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      serviceAccountName: {{ .Values.serviceAccount.name | default (ternary (include "caponier.fullname" .) "default" .Values.serviceAccount.create) }}
      # Nothing here talks to the API server.
      automountServiceAccountToken: false
      # Else a Service called caponier-… would put variables into the pod that look like settings.
      enableServiceLinks: false
      # Longer than the drain, so that what runs may end in its own time.
      terminationGracePeriodSeconds: {{ add (int .Values.drainSeconds) (int .Values.preStopSeconds) 60 }}
      securityContext:
        runAsNonRoot: true
        seccompProfile:
          type: RuntimeDefault
        {{- if not .Values.openshift }}
        runAsUser: {{ int .Values.runAs.user }}
        runAsGroup: {{ int .Values.runAs.group }}
        # Files of Secrets are root's, and readable by this group: that is what our programs accept of a key.
        fsGroup: {{ int .Values.runAs.group }}
        fsGroupChangePolicy: OnRootMismatch
        {{- end }}
      {{- with .Values.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      {{- with .Values.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .Values.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .Values.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- if .Values.topologySpread }}
      topologySpreadConstraints:
        {{- range $constraint := .Values.topologySpread }}
        - {{ toYaml $constraint | nindent 10 | trim }}
          labelSelector:
            matchLabels:
              {{- include "caponier.selector" $ | nindent 14 }}
        {{- end }}
      {{- end }}
      containers:
        - name: {{ $program }}
          image: {{ include "caponier.image" . | quote }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          args: [{{ $program }}, --config, /etc/caponier/config/{{ $program }}.toml]
          env:
            - name: CAPONIER_LOG
              value: {{ .Values.log.level | quote }}
            {{- with .Values.env }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          {{- $ports := include "chart.ports" . }}
          {{- if or (trim $ports) .Values.metrics.enabled }}
          ports:
            {{- with trim $ports }}
            {{- . | nindent 12 }}
            {{- end }}
            {{- if .Values.metrics.enabled }}
            - name: metrics
              containerPort: {{ int .Values.metrics.port }}
            {{- end }}
          {{- end }}
          securityContext:
            allowPrivilegeEscalation: false
            readOnlyRootFilesystem: true
            capabilities:
              drop: [ALL]
          startupProbe:
            {{- include "caponier.probe" (list . "livez") | nindent 12 }}
            periodSeconds: 2
            failureThreshold: 60
            timeoutSeconds: 10
          livenessProbe:
            {{- include "caponier.probe" (list . "livez") | nindent 12 }}
            periodSeconds: 20
            failureThreshold: 3
            timeoutSeconds: 10
          readinessProbe:
            {{- include "caponier.probe" (list . "readyz") | nindent 12 }}
            periodSeconds: 10
            failureThreshold: 2
            timeoutSeconds: 10
          {{- if and (gt (int .Values.preStopSeconds) 0) (semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version) }}
          lifecycle:
            preStop:
              sleep:
                seconds: {{ int .Values.preStopSeconds }}
          {{- end }}
          resources:
            {{- toYaml .Values.resources | nindent 12 }}
          volumeMounts:
            - name: config
              mountPath: /etc/caponier/config
              readOnly: true
            - name: run
              mountPath: /run/caponier
            - name: audit
              mountPath: /var/log/caponier
            {{- if .Values.existingSecret }}
            - name: keys
              mountPath: /etc/caponier/keys
              readOnly: true
            {{- end }}
            {{- $named := include "chart.named" . | fromYaml }}
            {{- range $named.secrets }}
            - name: {{ include "caponier.volume" (printf "named-%s" .) }}
              mountPath: /etc/caponier/secrets/{{ . }}
              readOnly: true
            {{- end }}
            {{- range $named.public }}
            - name: {{ include "caponier.volume" (printf "public-%s" .) }}
              mountPath: /etc/caponier/public/{{ . }}
              readOnly: true
            {{- end }}
            {{- with trim $mounts }}
            {{- . | nindent 12 }}
            {{- end }}
      volumes:
        - name: config
          configMap:
            name: {{ include "caponier.fullname" . }}
        # Sockets, for probes and whoever is let into the pod.
        - name: run
          emptyDir:
            medium: Memory
            sizeLimit: 1Mi
        {{- if not (and (eq .Values.audit.to "file") .Values.audit.persistence.enabled) }}
        # The trail goes with the pod, unless it goes to standard output.
        - name: audit
          emptyDir:
            sizeLimit: {{ .Values.audit.emptyDirSize }}
        {{- end }}
        {{- with .Values.existingSecret }}
        - name: keys
          secret:
            secretName: {{ . }}
            # With fsGroup, which adds the group's right to read.
            defaultMode: 0400
        {{- end }}
        {{- range $named.secrets }}
        - name: {{ include "caponier.volume" (printf "named-%s" .) }}
          secret:
            secretName: {{ . }}
            defaultMode: 0400
        {{- end }}
        {{- range $named.public }}
        - name: {{ include "caponier.volume" (printf "public-%s" .) }}
          configMap:
            name: {{ . }}
        {{- end }}
        {{- with trim (include "chart.volumes" .) }}
        {{- . | nindent 8 }}
        {{- end }}
  {{- if and (eq .Values.audit.to "file") .Values.audit.persistence.enabled }}
  # A trail outlives its pod, and the release too.
  persistentVolumeClaimRetentionPolicy:
    whenDeleted: Retain
    whenScaled: Retain
  volumeClaimTemplates:
    - metadata:
        name: audit
        labels:
          {{- include "caponier.selector" . | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with .Values.audit.persistence.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources:
          requests:
            storage: {{ .Values.audit.persistence.size }}
  {{- end }}
{{- end -}}

{{/* By the listener where there is one, else by a command in the pod: then nothing listens for it. */}}
{{- define "caponier.probe" -}}
{{- $root := index . 0 -}}
{{- $what := index . 1 -}}
{{- if $root.Values.metrics.enabled -}}
httpGet:
  path: /{{ $what }}
  port: metrics
{{- else -}}
exec:
  command: [/usr/bin/caponier, health, --socket, /run/caponier/health.sock{{ if eq $what "livez" }}, --live{{ end }}]
{{- end -}}
{{- end -}}

{{/* --- beside the pod ----------------------------------------------------------------------------------- */}}

{{- define "caponier.beside" -}}
{{- if .Values.serviceAccount.create }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- if .Values.serviceAccount.name }}
  {{- include "caponier.metadata" . | replace (printf "name: %s\n" (include "caponier.fullname" .)) (printf "name: %s\n" .Values.serviceAccount.name) | nindent 2 }}
  {{- else }}
  {{- include "caponier.metadata" . | nindent 2 }}
  {{- end }}
automountServiceAccountToken: false
{{- end }}
---
# Names the pods; and where metrics are on, says where they are.
apiVersion: v1
kind: Service
metadata:
  name: {{ include "caponier.fullname" . }}-pods
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "caponier.labels" . | nindent 4 }}
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    {{- include "caponier.selector" . | nindent 4 }}
  {{- if .Values.metrics.enabled }}
  ports:
    - name: metrics
      port: {{ int .Values.metrics.port }}
      targetPort: metrics
  {{- end }}
{{- if .Values.podDisruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "caponier.metadata" . | nindent 2 }}
spec:
  # Never a lower bound: with one replica, that would keep a node from being drained for good.
  maxUnavailable: {{ .Values.podDisruptionBudget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "caponier.selector" . | nindent 6 }}
{{- end }}
{{- if .Values.networkPolicy.enabled }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "caponier.metadata" . | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "caponier.selector" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  {{- $ingress := include "chart.ingress" . | fromYamlArray }}
  {{- if .Values.metrics.enabled }}
  {{- $ingress = append $ingress (dict "from" .Values.networkPolicy.metricsFrom "ports" (list (dict "port" (int .Values.metrics.port) "protocol" "TCP"))) }}
  {{- end }}
  {{- $ingress = concat $ingress .Values.networkPolicy.extraIngress }}
  ingress:
    {{- toYaml ($ingress | default list) | nindent 4 }}
  egress:
    {{- toYaml (concat (include "chart.egress" . | fromYamlArray) .Values.networkPolicy.extraEgress | default list) | nindent 4 }}
{{- end }}
{{- if and .Values.metrics.enabled .Values.metrics.serviceMonitor.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  name: {{ include "caponier.fullname" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "caponier.labels" . | nindent 4 }}
    {{- with .Values.metrics.serviceMonitor.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  # The alert rules know the jobs by this.
  jobLabel: app.kubernetes.io/name
  selector:
    matchLabels:
      {{- include "caponier.selector" . | nindent 6 }}
  endpoints:
    - port: metrics
      path: /metrics
      interval: {{ .Values.metrics.serviceMonitor.interval }}
{{- end }}
{{- if and .Values.metrics.enabled .Values.metrics.prometheusRule.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: {{ include "caponier.fullname" . }}
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "caponier.labels" . | nindent 4 }}
    {{- with .Values.metrics.prometheusRule.labels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- .Files.Get "files/alerts.yaml" | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The keys, certificates and passwords of a proxy on the way out, as settings of a program. Given: `proxy` of the values. */}}
{{- define "caponier.proxySettings" -}}
{{- if and .credentials.existingSecret (not .url) -}}
{{- fail "credentials for a proxy, and no url of one" -}}
{{- end -}}
{{- if .url }}
proxy: {{ .url | quote }}
{{- end }}
{{- if .credentials.existingSecret }}
proxy_credentials_file: {{ printf "/etc/caponier/secrets/%s/%s" .credentials.existingSecret .credentials.key | quote }}
{{- end }}
{{- if .ca.configMap }}
proxy_ca_file: {{ printf "/etc/caponier/public/%s/%s" .ca.configMap .ca.key | quote }}
{{- end }}
{{- with .noProxy }}
no_proxy: {{ toJson . }}
{{- end }}
{{- end -}}

{{/* Where to: the networks given, or everywhere. */}}
{{- define "caponier.egress.to" -}}
{{- range . }}
- ipBlock: {cidr: {{ . | quote }}}
{{- else }}
- ipBlock: {cidr: 0.0.0.0/0}
- ipBlock: {cidr: "::/0"}
{{- end }}
{{- end -}}

{{/* The port of HOST:PORT, or of a URL; 443 where it has none. */}}
{{- define "caponier.port" -}}
{{- regexFind ":[0-9]+(/|$)" (regexReplaceAll "^[a-z0-9]+://" . "") | trimAll ":/" | default "443" -}}
{{- end -}}

{{/* DNS, as a list of one rule. */}}
{{- define "caponier.egress.dns" -}}
- to: {{ toYaml .Values.networkPolicy.dns | nindent 4 }}
  ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
    {{- /* OpenShift's servers listen here. */}}
    - {port: 5353, protocol: UDP}
    - {port: 5353, protocol: TCP}
{{- end -}}

{{/* Ports of a rule ("6000-6010" is a range), as of a NetworkPolicy. */}}
{{- define "caponier.policyPorts" -}}
{{- range . }}
{{- $ends := splitList "-" (toString .) }}
- port: {{ first $ends }}
  {{- if gt (len $ends) 1 }}
  endPort: {{ last $ends }}
  {{- end }}
  protocol: TCP
{{- end }}
{{- end -}}
