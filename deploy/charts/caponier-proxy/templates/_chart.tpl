{{- define "chart.config" -}}
proxy:
  drain_s: {{ int .Values.drainSeconds }}
  {{- include "caponier.proxySettings" .Values.upstreamProxy | nindent 2 }}
  {{- with .Values.limits }}
  limits: {{ toJson . }}
  {{- end }}
upstream: {{ toJson .Values.upstreams }}
listener: {{ toJson .Values.listeners }}
{{- end -}}

{{- define "chart.restart" -}}
{{- $config := include "caponier.config" . | fromYaml -}}
{{- $addresses := list -}}
{{- range $config.listener }}{{ $addresses = append $addresses .address }}{{ end -}}
{{- dict "listen" $addresses "audit" $config.audit "log" $config.log "health" $config.health "metrics" $config.metrics | toYaml -}}
{{- end -}}

{{- define "chart.named" -}}
secrets: {{ without (append .Values.extraSecrets .Values.upstreamProxy.credentials.existingSecret | uniq) "" | toJson }}
public: {{ without (append .Values.extraConfigMaps .Values.upstreamProxy.ca.configMap | uniq) "" | toJson }}
{{- end -}}

{{- define "chart.mounts" -}}
{{- end -}}

{{- define "chart.volumes" -}}
{{- end -}}

{{- define "chart.ports" -}}
{{- range .Values.listeners }}
- name: {{ printf "port-%s" (include "caponier.port" .address) }}
  containerPort: {{ include "caponier.port" .address }}
{{- end }}
{{- end -}}

{{- define "chart.ingress" -}}
{{- range .Values.listeners }}
- from:
    {{- range .accept_from }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    - {port: {{ include "caponier.port" .address }}, protocol: TCP}
{{- end }}
{{- end -}}

{{- define "chart.egress" -}}
{{- $ports := list -}}
{{- if .Values.upstreamProxy.url -}}
{{- $ports = list (include "caponier.port" .Values.upstreamProxy.url) -}}
{{- else -}}
{{- range .Values.upstreams }}{{ $ports = append $ports (include "caponier.port" .to) }}{{ end -}}
{{- end -}}
{{ include "caponier.egress.dns" . }}
# The upstreams, or the proxy on the way to them.
- to:
    {{- include "caponier.egress.to" .Values.networkPolicy.upstreams | nindent 4 }}
  ports:
    {{- range $ports | uniq | sortAlpha }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end -}}

{{- define "chart.beside" -}}
---
apiVersion: v1
kind: Service
metadata:
  {{- include "caponier.metadata" . | nindent 2 }}
  {{- with .Values.service.annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  type: {{ .Values.service.type }}
  {{- if ne .Values.service.type "ClusterIP" }}
  # The client's address reaches the proxy: it is what accept_from goes by.
  externalTrafficPolicy: Local
  {{- end }}
  selector:
    {{- include "caponier.selector" . | nindent 4 }}
  ports:
    {{- range .Values.listeners }}
    - name: {{ printf "port-%s" (include "caponier.port" .address) }}
      port: {{ include "caponier.port" .address }}
      targetPort: {{ printf "port-%s" (include "caponier.port" .address) }}
    {{- end }}
{{- end -}}

{{- define "chart.mistakes" -}}
{{- $ports := list -}}
{{- if .Values.metrics.enabled }}{{ $ports = list (toString (int .Values.metrics.port)) }}{{ end -}}
{{- range .Values.listeners -}}
{{- $port := include "caponier.port" .address -}}
{{- if regexMatch "^(127\\.|\\[::1\\])" .address -}}
{{- fail (printf "the listener %s is on loopback, where nobody outside of the pod can reach it: 0.0.0.0 is wanted" .address) -}}
{{- end -}}
{{- if lt (int $port) 1024 -}}
{{- fail (printf "the listener %s is on a port that the pod may not bind: one from 1024 on is wanted" .address) -}}
{{- end -}}
{{- if has $port $ports -}}
{{- fail (printf "the port of the listener %s is that of another, or of the metrics" .address) -}}
{{- end -}}
{{- $ports = append $ports $port -}}
{{- end -}}
{{- end -}}
