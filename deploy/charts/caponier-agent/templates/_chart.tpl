{{- define "chart.config" -}}
agent:
  id: {{ .Values.agent.id | quote }}
  host_key: {{ printf "/etc/caponier/keys/%s" .Values.agent.hostKey | quote }}
  drain_s: {{ int .Values.drainSeconds }}
  {{- include "caponier.proxySettings" .Values.agent.proxy | nindent 2 }}
  {{- with .Values.agent.gatewayCa }}
  {{- if .configMap }}
  tls_ca_file: {{ printf "/etc/caponier/public/%s/%s" .configMap .key | quote }}
  {{- end }}
  {{- end }}
  {{- with .Values.agent.tls.existingSecret }}
  tls_certificate: /etc/caponier/secrets/{{ . }}/tls.crt
  tls_key: /etc/caponier/secrets/{{ . }}/tls.key
  {{- end }}
  {{- with .Values.agent.limits }}
  limits: {{ toJson . }}
  {{- end }}
  {{- with .Values.agent.resolver }}
  resolver: {{ toJson . }}
  {{- end }}
organisation: {{ toJson .Values.organisations }}
{{- end -}}

{{- define "chart.restart" -}}
{{- $config := include "caponier.config" . | fromYaml -}}
{{- dict "id" $config.agent.id "audit" $config.audit "log" $config.log "health" $config.health "metrics" $config.metrics "listen" $config.listen | toYaml -}}
{{- end -}}

{{- define "chart.named" -}}
secrets: {{ without (concat .Values.extraSecrets (list .Values.agent.proxy.credentials.existingSecret .Values.agent.tls.existingSecret) | uniq) "" | toJson }}
public: {{ without (concat .Values.extraConfigMaps (list .Values.agent.proxy.ca.configMap .Values.agent.gatewayCa.configMap) | uniq) "" | toJson }}
{{- end -}}

{{- define "chart.mounts" -}}
{{- end -}}

{{- define "chart.volumes" -}}
{{- end -}}

{{- define "chart.ports" -}}
{{- $config := include "caponier.config" . | fromYaml -}}
{{- with $config.listen }}
- name: ssh
  containerPort: {{ .address | splitList ":" | last }}
{{- end }}
{{- end -}}

{{- define "chart.ingress" -}}
{{- $config := include "caponier.config" . | fromYaml -}}
{{- with $config.listen }}
- from:
    {{- range .accept_from }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    - {port: {{ .address | splitList ":" | last }}, protocol: TCP}
{{- else -}}
[]
{{- end }}
{{- end -}}

{{/* The ports of the gateways' addresses, or of the proxy where there is one. */}}
{{- define "chart.outPorts" -}}
{{- $ports := list -}}
{{- $urls := list -}}
{{- if .Values.agent.proxy.url -}}
{{- $urls = list .Values.agent.proxy.url -}}
{{- else -}}
{{- range .Values.organisations }}{{ range .gateways }}{{ $urls = concat $urls (ternary . (list .) (kindIs "slice" .)) }}{{ end }}{{ end -}}
{{- end -}}
{{- range $urls -}}
{{- $ports = append $ports (include "caponier.port" .) -}}
{{- end -}}
{{- $ports | uniq | sortAlpha | toJson -}}
{{- end -}}

{{- define "chart.egress" -}}
{{ include "caponier.egress.dns" . }}
{{- /* A rule without ports or networks would mean all of them. */}}
{{- with include "chart.outPorts" . | fromJsonArray }}
# The gateways, or the proxy on the way to them.
- to:
    {{- include "caponier.egress.to" $.Values.networkPolicy.gateways | nindent 4 }}
  ports:
    {{- range . }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- if .Values.networkPolicy.fromAllowlist }}
{{- range .Values.organisations }}
{{- range .allow }}
{{- if or .within .addresses }}
# What the rule {{ .name }} allows.
- to:
    {{- range concat (.within | default list) (.addresses | default list) }}
    - ipBlock: {cidr: {{ ternary . (printf "%s/%s" . (ternary "128" "32" (contains ":" .))) (contains "/" .) | quote }}}
    {{- end }}
  ports:
    {{- include "caponier.policyPorts" .ports | nindent 4 }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.agent.resolver }}
{{- with .servers }}
# The DNS servers that it believes.
- to:
    {{- range . }}
    {{- $host := regexReplaceAll ":[0-9]+$" . "" | trimAll "[]" }}
    - ipBlock: {cidr: {{ printf "%s/%s" $host (ternary "128" "32" (contains ":" $host)) | quote }}}
    {{- end }}
  ports:
    {{- range . }}
    - {port: {{ regexFind "[0-9]+$" . }}, protocol: UDP}
    - {port: {{ regexFind "[0-9]+$" . }}, protocol: TCP}
    {{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "chart.beside" -}}
{{- end -}}

{{- define "chart.mistakes" -}}
{{- $config := include "caponier.config" . | fromYaml -}}
{{- if and $config.listen .Values.metrics.enabled -}}
{{- if eq (include "caponier.port" $config.listen.address) (toString (int .Values.metrics.port)) -}}
{{- fail (printf "metrics.port is %d, where the agent listens for SSH" (int .Values.metrics.port)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
