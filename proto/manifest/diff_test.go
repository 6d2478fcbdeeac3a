package manifest

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

func TestDiffChanged(t *testing.T) {
	before := samplePool()
	after := proto.CloneOf(before)
	after.Metadata.Revision, after.Metadata.Generation = 43, 3
	after.Metadata.Labels["zone"] = "a"
	after.GetBackendPool().Endpoints = after.GetBackendPool().Endpoints[1:]
	after.GetBackendPool().HealthCheck.Interval = seconds(60)
	const want = `--- BackendPool/jetty
+++ BackendPool/jetty
@@ -5,12 +5,11 @@
   labels:
     app: web
     tier: "1"
+    zone: a
   annotations:
     note: 'a: b'
 spec:
   endpoints:
-    - address: 10.0.0.1:8443
-      weight: 0
     - address: '[::1]:443'
   protocol: http2
   tls:
@@ -28,7 +27,7 @@
     expectedStatuses:
       - 200
       - 404
-    interval: 1h
+    interval: 1m
   retries:
     "on":
       - "502"
`
	if diff := cmp.Diff(want, Diff(before, after)); diff != "" {
		t.Errorf("diff (-want +got):\n%s", diff)
	}
	after = proto.CloneOf(before)
	after.Metadata.Revision, after.Metadata.Uid = 99, "other"
	if got := Diff(before, after); got != "" {
		t.Errorf("assigned metadata makes a difference:\n%s", got)
	}
}

func TestDiffCreatedAndDeleted(t *testing.T) {
	keyring := resealv1.NewResource("Keyring")
	keyring.Metadata.Name = "k"
	const created = `--- /dev/null
+++ Keyring/k
@@ -0,0 +1,5 @@
+apiVersion: reseal/v1
+kind: Keyring
+metadata:
+  name: k
+spec: {}
`
	if diff := cmp.Diff(created, Diff(nil, keyring)); diff != "" {
		t.Errorf("created (-want +got):\n%s", diff)
	}
	const deleted = `--- Keyring/k
+++ /dev/null
@@ -1,5 +0,0 @@
-apiVersion: reseal/v1
-kind: Keyring
-metadata:
-  name: k
-spec: {}
`
	if diff := cmp.Diff(deleted, Diff(keyring, nil)); diff != "" {
		t.Errorf("deleted (-want +got):\n%s", diff)
	}
	if got := Diff(nil, nil); got != "" {
		t.Errorf("nothing became nothing:\n%s", got)
	}
}

func TestDiffHidesSecrets(t *testing.T) {
	cert := func(key string) *resealv1.Resource {
		return certificateOf("web", &resealv1.Certificate{CertificatePem: "chain", PrivateKeyPem: key})
	}
	const marker = resealv1.SecretMarker
	tests := []struct {
		name          string
		before, after *resealv1.Resource
		changed       []string
		want          []string // the lines that differ
	}{
		{"changed", cert("old-secret"), cert("new-secret"), nil, []string{"+  privateKeyPem: changed"}},
		{"same", cert("old-secret"), cert("old-secret"), nil, nil},
		{"both redacted", cert(marker), cert(marker), nil, nil},
		{"both redacted, said to be changed", cert(marker), cert(marker), []string{"spec.privateKeyPem"}, []string{"+  privateKeyPem: changed"}},
		{"one redacted", cert(marker), cert("new-secret"), nil, nil},
		{"added", cert(""), cert("new-secret"), nil, []string{"+  privateKeyPem: <redacted>"}},
		{"removed", cert("old-secret"), cert(""), nil, []string{"-  privateKeyPem: <redacted>"}},
	}
	for _, test := range tests {
		got := Diff(test.before, test.after, test.changed...)
		if strings.Contains(got, "secret") {
			t.Errorf("%s: a secret is shown:\n%s", test.name, got)
		}
		var lines []string
		for line := range strings.Lines(got) {
			if strings.Contains(line, "privateKey") && line[0] != ' ' {
				lines = append(lines, strings.TrimSuffix(line, "\n"))
			}
		}
		if diff := cmp.Diff(test.want, lines); diff != "" {
			t.Errorf("%s (-want +got):\n%s\nin\n%s", test.name, diff, got)
		}
		if len(test.want) == 0 && got != "" {
			t.Errorf("%s: there is a difference:\n%s", test.name, got)
		}
	}
	if before := cert("old-secret"); Diff(before, cert("x")) == "" || before.GetCertificate().PrivateKeyPem != "old-secret" {
		t.Error("Diff changes its arguments")
	}
	if got := Diff(nil, cert("new-secret")); strings.Contains(got, "new-secret") {
		t.Errorf("a created secret is shown:\n%s", got)
	}
}

// The edits of a diff lead from one side to the other, and there are no fewer.
func TestDiffLines(t *testing.T) {
	lines := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "c", "d"}), 0, 30)
	rapid.Check(t, func(t *rapid.T) {
		a, b := lines.Draw(t, "a"), lines.Draw(t, "b")
		var before, after []string
		kept := 0
		for _, e := range diffLines(a, b) {
			if e.op != '+' {
				before = append(before, e.line)
			}
			if e.op != '-' {
				after = append(after, e.line)
			}
			if e.op == ' ' {
				kept++
			}
		}
		if !slices.Equal(a, before) || !slices.Equal(b, after) {
			t.Fatalf("edits lead from %q to %q", before, after)
		}
		if want := commonLines(a, b); kept != want {
			t.Fatalf("%d lines kept, want %d", kept, want)
		}
	})
}

// commonLines is the length of the longest common subsequence.
func commonLines(a, b []string) int {
	row := make([]int, len(b)+1)
	for _, line := range a {
		diagonal := 0
		for j := range b {
			next := row[j+1]
			if line == b[j] {
				row[j+1] = diagonal + 1
			} else {
				row[j+1] = max(row[j+1], row[j])
			}
			diagonal = next
		}
	}
	return row[len(b)]
}

func TestDiffBoundsItsWork(t *testing.T) {
	a := make([]string, 5000)
	b := make([]string, 5000)
	for i := range a {
		a[i], b[i] = "a", "b"
	}
	if got := len(diffLines(a, b)); got != 10000 {
		t.Errorf("%d edits, want all lines replaced", got)
	}
}
