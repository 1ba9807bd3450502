{{- define "chart.config" -}}
{{- $addresses := list (printf "0.0.0.0:%d" (int .Values.gateway.port)) -}}
{{- if .Values.gateway.ipv6 }}{{ $addresses = append $addresses (printf "[::]:%d" (int .Values.gateway.port)) }}{{ end -}}
gateway:
  {{- if not .Values.gateway.listener }}
  listen: {{ toJson $addresses }}
  {{- end }}
  host_key: {{ printf "/etc/caponier/keys/%s" .Values.gateway.hostKey | quote }}
  {{- with .Values.gateway.hostCertificate }}
  host_certificate: {{ printf "/etc/caponier/keys/%s" . | quote }}
  {{- end }}
  registry: /etc/caponier/registry
  admin_socket: /run/caponier/gateway.sock
  drain_s: {{ int .Values.drainSeconds }}
  {{- with .Values.gateway.limits }}
  limits: {{ toJson . }}
  {{- end }}
  {{- with .Values.gateway.penalties }}
  penalties: {{ toJson . }}
  {{- end }}
{{- if .Values.gateway.listener }}
listener:
  {{- range $addresses }}
  - {{ mergeOverwrite (deepCopy $.Values.gateway.listener) (dict "address" .) | toJson }}
  {{- end }}
{{- end }}
{{- with .Values.gateway.certificates }}
certificate:
  {{- range . }}
  - chain: /etc/caponier/secrets/{{ . }}/tls.crt
    key: /etc/caponier/secrets/{{ . }}/tls.key
  {{- end }}
{{- end }}
organisation:
  {{- range .Values.organisations }}
  - id: {{ .id | quote }}
    login_key: {{ printf "/etc/caponier/keys/%s" .loginKey | quote }}
    {{- with .loginCertificate }}
    login_certificate: {{ printf "/etc/caponier/keys/%s" . | quote }}
    {{- end }}
  {{- end }}
{{- end -}}

{{- define "chart.restart" -}}
{{- $config := include "caponier.config" . | fromYaml -}}
{{- $addresses := list -}}
{{- range $config.listener }}{{ $addresses = append $addresses .address }}{{ end -}}
{{- dict "listen" (concat ($config.gateway.listen | default list) $addresses) "audit" $config.audit "log" $config.log "health" $config.health "metrics" $config.metrics | toYaml -}}
{{- end -}}

{{- define "chart.named" -}}
secrets: {{ concat .Values.extraSecrets .Values.gateway.certificates | uniq | toJson }}
public: {{ .Values.extraConfigMaps | uniq | toJson }}
{{- end -}}

{{- define "chart.mounts" -}}
- name: registry
  mountPath: /etc/caponier/registry
  readOnly: true
{{- end -}}

{{/* A file of the registry as a key of a ConfigMap, which may have no '/'. */}}
{{- define "chart.registryKey" -}}
{{- printf "%s-%s" (sha256sum . | trunc 12) (base .) -}}
{{- end -}}

{{- define "chart.volumes" -}}
- name: registry
  {{- if .Values.registry.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ .Values.registry.existingClaim }}
    readOnly: true
  {{- else if .Values.registry.files }}
  configMap:
    name: {{ include "caponier.fullname" . }}-registry
    items:
      {{- range $path, $text := .Values.registry.files }}
      - key: {{ include "chart.registryKey" $path }}
        path: {{ $path | quote }}
      {{- end }}
  {{- else }}
  {{- fail "who may come in? Give registry.files or registry.existingClaim" }}
  {{- end }}
{{- end -}}

{{- define "chart.ports" -}}
- name: caponier
  containerPort: {{ int .Values.gateway.port }}
{{- end -}}

{{- define "chart.ingress" -}}
- from: {{ toYaml .Values.networkPolicy.clients | nindent 4 }}
  ports:
    - {port: {{ int .Values.gateway.port }}, protocol: TCP}
{{- end -}}

{{/* A gateway is dialled, and dials nobody. */}}
{{- define "chart.egress" -}}
[]
{{- end -}}

{{- define "chart.service" -}}
spec:
  type: {{ .Values.service.type }}
  {{- if ne .Values.service.type "ClusterIP" }}
  # The client's address reaches the gateway: it is what accept_from and penalties go by.
  externalTrafficPolicy: {{ .Values.service.externalTrafficPolicy }}
  {{- end }}
  {{- with .Values.service.loadBalancerClass }}
  loadBalancerClass: {{ . }}
  {{- end }}
  {{- with .Values.service.loadBalancerSourceRanges }}
  loadBalancerSourceRanges:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - name: caponier
      port: {{ int .Values.service.port }}
      targetPort: caponier
{{- end -}}

{{- define "chart.beside" -}}
{{- $several := .Values.replicas | int -}}
{{- if .Values.autoscaling.enabled }}{{ $several = .Values.autoscaling.maxReplicas | int }}{{ end -}}
{{- if not .Values.registry.existingClaim }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ include "caponier.fullname" . }}-registry
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "caponier.labels" . | nindent 4 }}
data:
  {{- range $path, $text := .Values.registry.files }}
  {{- if contains "PRIVATE KEY" $text }}
  {{- fail (printf "registry.files has a private key as %s: the registry is of public ones. Make a new key, since this one is known by now" $path) }}
  {{- end }}
  {{ include "chart.registryKey" $path }}: {{ $text | quote }}
  {{- end }}
{{- end }}
---
# For clients: any gateway will do.
apiVersion: v1
kind: Service
metadata:
  {{- include "caponier.metadata" . | nindent 2 }}
  {{- with .Values.service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{ include "chart.service" . }}
  selector:
    {{- include "caponier.selector" . | nindent 4 }}
{{- if gt $several 1 }}
{{- range $at := until $several }}
---
# For agents, which link to every gateway: one address each, also of those that autoscaling has not started yet.
apiVersion: v1
kind: Service
metadata:
  name: {{ include "caponier.fullname" $ }}-{{ $at }}
  namespace: {{ $.Release.Namespace }}
  labels:
    {{- include "caponier.labels" $ | nindent 4 }}
  {{- with $.Values.service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{ include "chart.service" $ }}
  selector:
    {{- include "caponier.selector" $ | nindent 4 }}
    statefulset.kubernetes.io/pod-name: {{ include "caponier.fullname" $ }}-{{ $at }}
{{- end }}
{{- end }}
{{- if .Values.autoscaling.enabled }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  {{- include "caponier.metadata" . | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: StatefulSet
    name: {{ include "caponier.fullname" . }}
  minReplicas: {{ int .Values.autoscaling.minReplicas }}
  maxReplicas: {{ int .Values.autoscaling.maxReplicas }}
  metrics:
    - type: Resource
      resource:
        name: cpu
        target:
          type: Utilization
          averageUtilization: {{ int .Values.autoscaling.targetCPU }}
    {{- with .Values.autoscaling.metrics }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  behavior:
    scaleUp:
      stabilizationWindowSeconds: 60
    # A gateway that goes drains what runs there, for up to drainSeconds: so one at a time, and no other before that is over.
    scaleDown:
      stabilizationWindowSeconds: {{ max 600 (int .Values.drainSeconds) | min 3600 }}
      policies:
        - type: Pods
          value: 1
          periodSeconds: {{ max 60 (int .Values.drainSeconds) | min 1800 }}
{{- end }}
{{- end -}}

{{- define "chart.mistakes" -}}
{{- if and .Values.metrics.enabled (eq (int .Values.metrics.port) (int .Values.gateway.port)) -}}
{{- fail (printf "metrics.port and gateway.port are both %d" (int .Values.gateway.port)) -}}
{{- end -}}
{{- if hasKey .Values.gateway.listener "address" -}}
{{- fail "gateway.listener has an address, which is made of gateway.port and gateway.ipv6" -}}
{{- end -}}
{{- if and .Values.registry.files .Values.registry.existingClaim -}}
{{- fail "registry.files and registry.existingClaim are both given: which of them says who may come in?" -}}
{{- end -}}
{{- if and (ne .Values.service.type "LoadBalancer") (or .Values.service.loadBalancerClass .Values.service.loadBalancerSourceRanges) -}}
{{- fail (printf "service.loadBalancerClass and service.loadBalancerSourceRanges do nothing where service.type is %s" .Values.service.type) -}}
{{- end -}}
{{- if .Values.autoscaling.enabled -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas is %d, more than autoscaling.maxReplicas, %d" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if not (dig "requests" "cpu" "" .Values.resources) -}}
{{- fail "autoscaling goes by a share of the requested processor time, and resources.requests.cpu is not given" -}}
{{- end -}}
{{- end -}}
{{- end -}}
