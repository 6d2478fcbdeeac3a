package store

import (
	"context"
	"errors"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/reflect/protoreflect"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// dump is every key below the prefix with its value.
func dump(t *testing.T, cfg Config) map[string]string {
	t.Helper()
	resp, err := cfg.Client.Get(context.Background(), cfg.Prefix, clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, kv := range resp.Kvs {
		found[string(kv.Key)] = string(kv.Value)
	}
	return found
}

const (
	secretA = "-----BEGIN PRIVATE KEY-----\nalpha-alpha-alpha\n-----END PRIVATE KEY-----\n"
	secretB = "-----BEGIN PRIVATE KEY-----\nbravo-bravo-bravo\n-----END PRIVATE KEY-----\n"
)

// Every secret in the contract must be of the form that the walk handles.
func TestEverySecretIsAString(t *testing.T) {
	found := 0
	seen := map[protoreflect.FullName]bool{}
	var visit func(protoreflect.MessageDescriptor)
	visit = func(desc protoreflect.MessageDescriptor) {
		if seen[desc.FullName()] {
			return
		}
		seen[desc.FullName()] = true
		for i := range desc.Fields().Len() {
			field := desc.Fields().Get(i)
			if isSecret(field) {
				found++
				if field.Kind() != protoreflect.StringKind || field.IsList() || field.IsMap() {
					t.Errorf("%s is not a single string", field.FullName())
				}
			}
			if field.Message() != nil {
				visit(field.Message())
			}
		}
	}
	visit((&resealv1.Resource{}).ProtoReflect().Descriptor())
	if found == 0 {
		t.Error("no field is a secret")
	}
}

func TestPrivateKeysAreWriteOnly(t *testing.T) {
	type step struct {
		name    string
		apply   *resealv1.Resource
		want    string // the action, or the violation
		changed []string
		key     string // in clear, afterwards
	}
	path := []string{"spec.privateKeyPem"}
	files := &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: "c"},
		Spec:     &resealv1.Resource_Certificate{Certificate: &resealv1.Certificate{CertificateFile: "/c.pem", PrivateKeyFile: "/k.pem"}},
	}
	steps := []step{
		{"new without key", certificate("c", "PEM1", ""), "Certificate/c: spec.privateKeyPem", nil, ""},
		{"marker", certificate("c", "PEM1", resealv1.SecretMarker), "Certificate/c: spec.privateKeyPem", nil, ""},
		{"stored form", certificate("c", "PEM1", "sealed:v1:AAAA"), "Certificate/c: spec.privateKeyPem", nil, ""},
		{"stored form of another version", certificate("c", "PEM1", " sealed:v9:AAAA"), "Certificate/c: spec.privateKeyPem", nil, ""},
		{"new", certificate("c", "PEM1", secretA), "created", path, secretA},
		{"same key again", certificate("c", "PEM1", secretA), "unchanged", nil, secretA},
		{"absent key", certificate("c", "PEM1", ""), "unchanged", nil, secretA},
		{"absent key, other labels", labelled(certificate("c", "PEM1", ""), "a", "b"), "configured", []string{}, secretA},
		{"other key", labelled(certificate("c", "PEM1", secretB), "a", "b"), "configured", path, secretB},
		{"other certificate without key", certificate("c", "PEM2", ""), "Certificate/c: spec.privateKeyPem", nil, secretB},
		{"other certificate, same key", certificate("c", "PEM2", secretB), "configured", []string{}, secretB},
		{"files", files, "configured", path, ""},
		{"no stored key", certificate("c", "PEM2", ""), "Certificate/c: spec.privateKeyPem", nil, ""},
	}
	cfg, log := testConfig(t)
	s := run(t, cfg)
	for _, step := range steps {
		resp, err := s.Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{step.apply}})
		if err != nil {
			diff(t, step.name, violationsOf(t, err), []string{step.want})
		} else {
			diff(t, step.name, actions(resp.Changes), []string{"Certificate/c " + step.want})
			diff(t, step.name+": changed secrets", resp.Changes[0].ChangedSecrets, step.changed)
			assertNoSecret(t, step.name, prototext.Format(resp))
		}
		if stored := s.Snapshot().Get("Certificate", "c"); stored != nil {
			clear, err := s.Unseal(stored)
			if err != nil {
				t.Fatalf("%s: %v", step.name, err)
			}
			diff(t, step.name+": key in clear", clear.GetCertificate().GetPrivateKeyPem(), step.key)
		}
	}
	revisions, err := s.Revisions(t.Context(), &resealv1.ListRevisionsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	assertNoSecret(t, "history", prototext.Format(revisions))
	diff(t, "secrets of the newest revision", revisions.Revisions[0].Changes[0].ChangedSecrets, path)
	assertNoSecret(t, "log", log.buf.String())
	for key, value := range dump(t, cfg) {
		assertNoSecret(t, key, value)
	}
}

func assertNoSecret(t *testing.T, where, text string) {
	t.Helper()
	for _, secret := range []string{"alpha-alpha", "bravo-bravo", "sealed:v1:"} {
		// In etcd the sealed form is what is expected.
		if strings.Contains(text, secret) && !(secret == "sealed:v1:" && strings.HasPrefix(where, "/")) {
			t.Errorf("%s holds %q", where, secret)
		}
	}
}

func TestSealedAtRestInEveryMVCCRevision(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	mustApply(t, s, certificate("c", "PEM1", secretA))
	mustApply(t, s, certificate("c", "PEM1", secretB), certificate("d", "PEM", secretA))
	mustDelete(t, s, ref("Certificate", "c"))
	if _, err := s.Rollback(t.Context(), "tester", &resealv1.RollbackRequest{}); err != nil {
		t.Fatal(err)
	}
	values := 0
	current := s.Snapshot().Revision()
	for revision := int64(1); revision <= current; revision++ {
		resp, err := cfg.Client.Get(t.Context(), cfg.Prefix, clientv3.WithPrefix(), clientv3.WithRev(revision))
		if err != nil {
			continue // compacted by another test
		}
		for _, kv := range resp.Kvs {
			values++
			assertNoSecret(t, string(kv.Key), string(kv.Value))
		}
	}
	if values == 0 {
		t.Error("nothing was looked at")
	}
}

func TestSealedValueBelongsToItsPlace(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	mustApply(t, s, certificate("c", "PEM1", secretA))
	moved := certificate("d", "PEM1", s.Snapshot().Get("Certificate", "c").GetCertificate().GetPrivateKeyPem())
	if _, err := s.Unseal(moved); !errors.Is(err, errBadKey) || !strings.Contains(err.Error(), "Certificate/d: spec.privateKeyPem") {
		t.Errorf("a sealed key of another resource: %v", err)
	}
	for _, broken := range []string{"in clear", "sealed:v1:%%%", "sealed:v1:", "sealed:v2:AAAA"} {
		if _, err := s.Unseal(certificate("c", "PEM1", broken)); err == nil {
			t.Errorf("%q could be opened", broken)
		}
	}
}

func TestRedactAndUnsealCopy(t *testing.T) {
	cfg, _ := testConfig(t)
	s := run(t, cfg)
	mustApply(t, s, certificate("c", "PEM1", secretA), pool("a", "10.0.0.1:443"))
	before := encoded(t, s.Snapshot())
	stored := s.Snapshot().Get("Certificate", "c")
	if got := s.Redact(stored).GetCertificate().GetPrivateKeyPem(); got != resealv1.SecretMarker {
		t.Errorf("redacted key: %q", got)
	}
	clear, err := s.Unseal(stored)
	if err != nil || clear.GetCertificate().GetPrivateKeyPem() != secretA {
		t.Errorf("unsealed: %v, %v", clear, err)
	}
	plain := s.Snapshot().Get("BackendPool", "a")
	if copied, err := s.Unseal(plain); err != nil || copied == plain {
		t.Errorf("Unseal gave the resource of the snapshot (%v)", err)
	}
	if s.Redact(nil) != nil {
		t.Error("Redact(nil) is something")
	}
	diff(t, "the snapshot", encoded(t, s.Snapshot()), before)
}

// A key-encryption key that is gone must not keep operators from giving the
// secrets again.
func TestLostSealingKey(t *testing.T) {
	cfg, log := testConfig(t)
	s := run(t, cfg)
	mustApply(t, s, certificate("c", "PEM1", secretA))
	other := newSealer(t)
	cfg.Seal, cfg.Open = other.seal, other.open
	s = run(t, cfg)
	if _, err := s.Unseal(s.Snapshot().Get("Certificate", "c")); !errors.Is(err, errBadKey) {
		t.Errorf("opened with another key: %v", err)
	}
	diff(t, "the same key", actions(mustApply(t, s, certificate("c", "PEM1", secretA)).Changes), []string{"Certificate/c configured"})
	if clear, err := s.Unseal(s.Snapshot().Get("Certificate", "c")); err != nil || clear.GetCertificate().GetPrivateKeyPem() != secretA {
		t.Errorf("after the repair: %v", err)
	}
	if !log.contains("can't be opened") {
		t.Error("the log does not say that a secret can't be opened")
	}
	cfg.Seal = nil
	if _, err := run(t, cfg).Apply(t.Context(), "tester", &resealv1.ApplyRequest{Resources: []*resealv1.Resource{certificate("e", "P", secretB)}}); err == nil {
		t.Error("a secret was stored without a key to seal it with")
	}
}
