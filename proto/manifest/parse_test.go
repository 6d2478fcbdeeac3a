package manifest

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"google.golang.org/protobuf/testing/protocmp"
)

const jetty = `apiVersion: reseal/v1
kind: BackendPool
metadata:
  name: jetty
spec:
  endpoints:
    - address: 10.0.0.1:8443
`

// errorLines is the text of err by line, nil for no error.
func errorLines(t *testing.T, err error) []string {
	t.Helper()
	if err == nil {
		return nil
	}
	var all Errors
	if !errors.As(err, &all) {
		t.Fatalf("error is a %T, want Errors: %v", err, err)
	}
	return strings.Split(err.Error(), "\n")
}

func wantErrors(t *testing.T, err error, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, errorLines(t, err)); diff != "" {
		t.Errorf("errors (-want +got):\n%s", diff)
	}
}

func TestParseAllFields(t *testing.T) {
	const text = `
apiVersion: reseal/v1
kind: BackendPool
metadata:
  name: jetty
  labels: {app: web, "app.kubernetes.io/name": jetty}
  annotations:
    note: 2024-01-02
spec:
  endpoints:
    - address: 10.0.0.1:8443
      weight: 0
    - {address: "[2001:db8::1]:8443"}
  protocol: HTTP2
  tls:
    serverName: backend.example
    trust:
      system: true
  sessions:
    mode: off
    coalesceTimeout: 1m30s
  connections:
    reuse: Never
    maxRequests: 7
    closeTimeout: 0s
  loadBalancing:
    algorithm: least-request
  retries:
    attempts: 0
    on: [connect.failure, 502, "503"]
  timeouts:
    connect: 250ms
  healthCheck:
`
	objects, err := Parse("pool.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := poolOf("jetty", &resealv1.BackendPool{
		Endpoints: []*resealv1.Endpoint{
			{Address: "10.0.0.1:8443", Weight: new(uint32(0))},
			{Address: "[2001:db8::1]:8443"},
		},
		Protocol: resealv1.BackendPool_PROTOCOL_HTTP2,
		Tls: &resealv1.BackendTLS{
			ServerName: "backend.example",
			Trust:      &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_System{System: true}},
		},
		Sessions: &resealv1.Sessions{Mode: resealv1.Sessions_MODE_OFF, CoalesceTimeout: seconds(90)},
		Connections: &resealv1.Connections{
			Reuse: resealv1.Connections_REUSE_NEVER, MaxRequests: 7, CloseTimeout: seconds(0),
		},
		LoadBalancing: &resealv1.LoadBalancing{Algorithm: resealv1.LoadBalancing_ALGORITHM_LEAST_REQUEST},
		Retries: &resealv1.Retries{Attempts: new(uint32(0)), On: []resealv1.Retries_Condition{
			resealv1.Retries_CONDITION_CONNECT_FAILURE, resealv1.Retries_CONDITION_502, resealv1.Retries_CONDITION_503,
		}},
		Timeouts: &resealv1.BackendTimeouts{Connect: seconds(0.25)},
	})
	want.Metadata.Labels = map[string]string{"app": "web", "app.kubernetes.io/name": "jetty"}
	want.Metadata.Annotations = map[string]string{"note": "2024-01-02"}
	if diff := cmp.Diff(want, objects[0].Resource, protocmp.Transform()); diff != "" {
		t.Errorf("resource (-want +got):\n%s", diff)
	}
}

func TestParseTLSVersionForms(t *testing.T) {
	for _, text := range []string{"tls1.2", "TLS1_2", "tls1-2", `"tls1.2"`} {
		objects, err := Parse("p", fmt.Appendf(nil, "apiVersion: reseal/v1\nkind: TLSPolicy\nmetadata: {name: p}\nspec: {minVersion: %s}\n", text))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := objects[0].Resource.GetTlsPolicy().MinVersion; got != resealv1.TLSVersion_TLS_VERSION_TLS1_2 {
			t.Errorf("%s is %v", text, got)
		}
	}
}

func TestParseIgnoresAssignedMetadata(t *testing.T) {
	text := strings.Replace(jetty, "  name: jetty\n",
		"  name: jetty\n  uid: u\n  generation: 3\n  revision: abc\n  createdAt: 2024-01-02T03:04:05Z\n  updatedAt: {}\n", 1)
	objects, err := Parse("p", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	want := &resealv1.Metadata{Name: "jetty"}
	if diff := cmp.Diff(want, objects[0].Resource.Metadata, protocmp.Transform()); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}
}

func TestParseReportsEverything(t *testing.T) {
	const text = `# a comment
---
apiVersion: reseal/v1
kind: BackendPool
metadata:
  name: jetty
  labels:
    retries: 3
spec:
  endpoints:
    - address: 10.0.0.1
    - address: b.example:443
      wieght: 2
    - 5
  load_balancing: {}
  protocol: http3
  connections:
    reuse: nevr
    reuse: always
    maxRequests: 1.5
    idleTimeout: 30
    maxLifetime: 7d
    closeTimeout: -1s
  tls:
    trust:
      caFile: /ca.pem
      system: true
    insecureSkipVerify: yes
    subjectAltNames: one
---
a: [
---
apiVersion: reseal/v2
kind: BackendPol
metadata: {name: x}
---
kind: Route
metadata:
spec: []
extra: 1
---
just text
---
apiVersion: reseal/v1
kind: BackendPool
metadata:
  name: jetty
spec:
  endpoints:
    - address: c.example
`
	objects, err := Parse("f.yaml", []byte(text))
	wantErrors(t, err,
		`f.yaml:8:5: BackendPool/jetty: metadata.labels["retries"]: must be text; put 3 in quotes`,
		`f.yaml:11:7: BackendPool/jetty: spec.endpoints[0].address: "10.0.0.1" has no port`,
		`f.yaml:13:7: BackendPool/jetty: spec.endpoints[1].wieght: unknown field; did you mean "weight"?`,
		`f.yaml:14:7: BackendPool/jetty: spec.endpoints[2]: must be a mapping with fields such as address`,
		`f.yaml:15:3: BackendPool/jetty: spec.load_balancing: unknown field; did you mean "loadBalancing"?`,
		`f.yaml:16:3: BackendPool/jetty: spec.protocol: "http3" is not known; did you mean "http1"?`,
		`f.yaml:18:5: BackendPool/jetty: spec.connections.reuse: "nevr" is not known; did you mean "never"?`,
		`f.yaml:19:5: BackendPool/jetty: spec.connections.reuse: is there twice, first at 18:5; remove one`,
		`f.yaml:20:5: BackendPool/jetty: spec.connections.maxRequests: "1.5" is not a whole number from 0 to 4294967295`,
		`f.yaml:21:5: BackendPool/jetty: spec.connections.idleTimeout: 30 has no unit; write 30s for seconds`,
		`f.yaml:22:5: BackendPool/jetty: spec.connections.maxLifetime: "7d" is not a duration; write for example 250ms, 1m30s or 12h`,
		`f.yaml:23:5: BackendPool/jetty: spec.connections.closeTimeout: "-1s" is negative`,
		`f.yaml:27:7: BackendPool/jetty: spec.tls.trust.system: only one of caPem, caFile or system may be set`,
		`f.yaml:28:5: BackendPool/jetty: spec.tls.insecureSkipVerify: "yes" is neither true nor false`,
		`f.yaml:29:5: BackendPool/jetty: spec.tls.subjectAltNames: must be a list`,
		`f.yaml:31: not valid YAML: did not find expected node content`,
		`f.yaml:33:1: BackendPol/x: apiVersion: "reseal/v2" is not known; write reseal/v1`,
		`f.yaml:34:1: BackendPol/x: kind: unknown kind "BackendPol"; did you mean "BackendPool"?`,
		`f.yaml:37:1: Route: apiVersion: is missing`,
		`f.yaml:38:1: Route: metadata.name: is missing; name the resource`,
		`f.yaml:39:1: Route: spec: must be a mapping with fields such as listeners`,
		`f.yaml:40:1: Route: extra: unknown field; known here: apiVersion, kind, metadata, spec`,
		`f.yaml:42:1: a resource must be a mapping with apiVersion, kind, metadata and spec`,
		`f.yaml:44:1: BackendPool/jetty: is there twice, first at f.yaml:3:1; remove one`,
		`f.yaml:50:7: BackendPool/jetty: spec.endpoints[0].address: "c.example" has no port`,
	)
	if len(objects) != 0 {
		t.Errorf("%d objects, want none", len(objects))
	}
}

func TestParseRefuses(t *testing.T) {
	header := "apiVersion: reseal/v1\nkind: BackendPool\nmetadata: {name: p}\n"
	tests := map[string]struct{ text, want string }{
		"alias":          {"a: &x 1\nb: *x\n", "f:1:4: anchors and aliases are not supported; write the value out"},
		"unknown alias":  {"a: *x\n", "f:1: not valid YAML: unknown anchor 'x' referenced"},
		"tag":            {"a: !x 1\n", "f:1:4: tags are not supported; write the plain value"},
		"binary":         {header + "spec: {tls: {serverName: !!binary eA==}}\n", `f:4:14: BackendPool/p: spec.tls.serverName: must be text; put eA== in quotes`},
		"merge":          {header + "spec: {<<: {}}\n", "f:4:8: BackendPool/p: spec.<<: unknown field; known here: endpoints, dns, protocol, tls, sessions, connections, loadBalancing, healthCheck, outlierDetection, timeouts, retries"},
		"deep":           {strings.Repeat("[", 40) + strings.Repeat("]", 40), "f:1:34: nested deeper than 32 levels"},
		"very deep":      {strings.Repeat("[", 20000), "f:1: not valid YAML: exceeded max depth of 10000"},
		"complex key":    {header + "spec: {? [a] : b, endpoints: []}\n", "f:4:10: BackendPool/p: spec: a key must be a plain name"},
		"no name":        {"apiVersion: reseal/v1\nkind: Keyring\nmetadata: {labels: {}}\n", "f:3:1: Keyring: metadata.name: is missing; name the resource"},
		"no kind":        {"apiVersion: reseal/v1\n", "f:1:1: kind: is missing"},
		"null item":      {header + "spec: {dns: {name: a, port: 1}, tls: {subjectAltNames: [null]}}\n", "f:4:57: BackendPool/p: spec.tls.subjectAltNames[0]: is empty; it must be text"},
		"octal":          {header + "spec: {dns: {name: a, port: 0o17}}\n", `f:4:23: BackendPool/p: spec.dns.port: "0o17" is not a whole number from 0 to 4294967295`},
		"leading zero":   {header + "spec: {dns: {name: a, port: 017}}\n", `f:4:23: BackendPool/p: spec.dns.port: "017" is not a whole number from 0 to 4294967295`},
		"too large":      {header + "spec: {dns: {name: a, port: 4294967296}}\n", `f:4:23: BackendPool/p: spec.dns.port: "4294967296" is not a whole number from 0 to 4294967295`},
		"number key":     {header[:len(header)-2] + ", labels: {1: a}}\nspec: {dns: {name: a, port: 1}}\n", `f:3:30: BackendPool/p: metadata.labels["1"]: the key must be text; put it in quotes`},
		"zero enum":      {header + "spec: {protocol: unspecified, dns: {name: a, port: 1}}\n", `f:4:8: BackendPool/p: spec.protocol: "unspecified" is not known; it is one of auto, http1, http2 or tcp`},
		"null map value": {header[:len(header)-2] + ", labels: {a: }}\nspec: {dns: {name: a, port: 1}}\n", `f:3:30: BackendPool/p: metadata.labels["a"]: is empty; it must be text`},
		"control":        {"a: \x01\n", "f:1: not valid YAML: control characters are not allowed"},
		"not UTF-8":      {"a: \xff\n", "f:1: not valid YAML: invalid leading UTF-8 octet"},
		"nested list":    {"apiVersion: reseal/v1\nkind: List\nitems:\n  - {apiVersion: reseal/v1, kind: List}\n", `f:4:29: List: kind: unknown kind "List"; it is one of BackendPool, TLSPolicy, Listener, Route, Certificate, Keyring or RolloutPolicy`},
		"list of text":   {"apiVersion: reseal/v1\nkind: List\nitem: []\nitems: x\n", "f:3:1: List: item: unknown field; did you mean \"items\"?\nf:4:1: List: items: is not a list"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			objects, err := Parse("f", []byte(test.text))
			wantErrors(t, err, strings.Split(test.want, "\n")...)
			if len(objects) > 0 {
				t.Errorf("%d objects, want none", len(objects))
			}
		})
	}
}

func TestParseNeverShowsSecrets(t *testing.T) {
	const secret = "8273645182736"
	header := "apiVersion: reseal/v1\nkind: Certificate\nmetadata: {name: c}\nspec:\n"
	for _, spec := range []string{
		"  privateKeyPem: " + secret + "\n",
		"  privateKeyPem: [" + secret + "]\n",
		"  privateKeyPem: \"" + secret + "\"\n",
		"  certificateFile: |\n    -----BEGIN PRIVATE KEY-----\n    " + secret + "\n",
		"  certificatePem: |\n    -----BEGIN PRIVATE KEY-----\n    " + secret + "\n",
	} {
		_, err := Parse("f", []byte(header+spec))
		if err == nil {
			t.Errorf("no error for %q", spec)
		} else if strings.Contains(err.Error(), secret) {
			t.Errorf("the error holds the secret: %v", err)
		}
	}
}

func TestParseJSON(t *testing.T) {
	const text = `{"apiVersion": "reseal/v1", "kind": "List", "metadata": {}, "items": [
	{"apiVersion":"reseal\/v1","kind":"Keyring","metadata":{"name":"a","annotations":{"x":"\ud83d\ude00 \\ud83d\\ude00 \u00e9"}},"spec":{"retireAfter":"1h"}},
	{
		"apiVersion": "reseal/v1",
		"kind": "Keyring",
		"metadata": {"name": "b"},
		"spec": {"retireAfter": 1, "rotate": null}
	}
]}`
	objects, err := Parse("l.json", []byte(text))
	wantErrors(t, err,
		`l.json:7:12: Keyring/b: spec.retireAfter: 1 has no unit; write 1s for seconds`,
		`l.json:7:30: Keyring/b: spec.rotate: unknown field; known here: rotationInterval, retireAfter, maxActiveAge, edgeSelector`,
	)
	if len(objects) != 1 {
		t.Fatalf("%d objects, want 1", len(objects))
	}
	if got, want := objects[0].Resource.Metadata.Annotations["x"], "\U0001F600 \\ud83d\\ude00 é"; got != want {
		t.Errorf("annotation %q, want %q", got, want)
	}
}

func TestParseBoundsErrors(t *testing.T) {
	var text strings.Builder
	text.WriteString("apiVersion: reseal/v1\nkind: Keyring\nmetadata: {name: a}\nspec:\n")
	for i := range 250 {
		fmt.Fprintf(&text, "  field%d: 1\n", i)
	}
	_, err := Parse("f", []byte(text.String()))
	lines := errorLines(t, err)
	if len(lines) != 101 || lines[100] != "and 150 more errors" {
		t.Errorf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
}

func TestParseBoundsSize(t *testing.T) {
	data := bytes.Repeat([]byte("#"), maxFileBytes+1)
	_, err := Parse("f", data)
	wantErrors(t, err, "f: is larger than 16 MiB; split it")
	if _, err := Parse("f", data[1:]); err != nil {
		t.Errorf("exactly 16 MiB: %v", err)
	}
}

func TestParseEmptyDocuments(t *testing.T) {
	text := "%YAML 1.1\n---\n# nothing\n---\n" + jetty + "...\n---\n\n---\nnull\n--- # end\n"
	objects, err := Parse("f", []byte(text))
	if err != nil || len(objects) != 1 {
		t.Errorf("%d objects, %v; want 1", len(objects), err)
	}
	if _, line, column := objects[0].Position("spec.endpoints[0].address"); line != 11 || column != 7 {
		t.Errorf("position %d:%d, want 11:7", line, column)
	}
}

func TestPosition(t *testing.T) {
	text := jetty + "  tls:\n    trust: {system: true}\n"
	text = strings.Replace(text, "  name: jetty\n", "  name: jetty\n  labels: {\"a.b/c\": x}\n", 1)
	objects, err := Parse("f", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"":                               "f:1:1",
		"spec":                           "f:6:1",
		"spec.endpoints":                 "f:7:3",
		"spec.endpoints[0]":              "f:8:7",
		"spec.endpoints[0].address":      "f:8:7",
		"spec.endpoints[0].weight":       "f:8:7",
		"spec.endpoints[1].address":      "f:7:3",
		"spec.tls.trust.system":          "f:10:13",
		"spec.tls.serverName":            "f:9:3",
		`metadata.labels["a.b/c"]`:       "f:5:12",
		`metadata.labels[a.b/c]`:         "f:5:12",
		`metadata.labels["a.b/d"]`:       "f:5:3",
		"spec.endpoints[x":               "f:7:3",
		"spec..endpoints":                "f:6:1",
		"nothing":                        "f:1:1",
		"spec.endpoints[99999999999999]": "f:7:3",
	} {
		file, line, column := objects[0].Position(path)
		if got := fmt.Sprintf("%s:%d:%d", file, line, column); got != want {
			t.Errorf("%q is at %s, want %s", path, got, want)
		}
	}
	if file, line, column := (Object{}).Position("spec"); file != "" || line != 0 || column != 0 {
		t.Errorf("zero object is at %s:%d:%d", file, line, column)
	}
}

func TestLocate(t *testing.T) {
	objects, err := Parse("f.yaml", []byte(jetty))
	if err != nil {
		t.Fatal(err)
	}
	err = Locate(objects, []*resealv1.Violation{
		{Resource: objects[0].Resource.Ref(), Field: "spec.endpoints[0].address", Description: "is wrong"},
		{Resource: &resealv1.ResourceRef{Kind: "Route", Name: "r"}, Field: "spec.pools[0].name", Description: "is gone"},
		{Resource: objects[0].Resource.Ref(), Description: "is refused"},
	})
	wantErrors(t, err,
		"f.yaml:7:7: BackendPool/jetty: spec.endpoints[0].address: is wrong",
		"Route/r: spec.pools[0].name: is gone",
		"f.yaml:1:1: BackendPool/jetty: is refused",
	)
	if err := Locate(objects, nil); err != nil {
		t.Errorf("no violations: %v", err)
	}
}

func TestKindByName(t *testing.T) {
	for name, want := range map[string]string{
		"BackendPool": "BackendPool", "backendpools": "BackendPool", "pool": "BackendPool", "Pools": "BackendPool", "bp": "BackendPool",
		"policy": "TLSPolicy", "policies": "TLSPolicy", "tlspolicy": "TLSPolicy", "tlspolicies": "TLSPolicy",
		"listener": "Listener", "LISTENERS": "Listener", "route": "Route", "routes": "Route",
		"cert": "Certificate", "certs": "Certificate", "certificate": "Certificate", "certificates": "Certificate",
		"keyring": "Keyring", "keyrings": "Keyring", "edges": "", "": "", "tlspolicys": "",
	} {
		if got, ok := KindByName(name); got != want || ok != (want != "") {
			t.Errorf("%q is %q, %v; want %q", name, got, ok, want)
		}
	}
}
