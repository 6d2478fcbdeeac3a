package main

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){"resealctl": main})
}

// leakChecked fails a run that leaves goroutines behind.
type leakChecked struct{ m *testing.M }

func (l leakChecked) Run() int {
	code := l.m.Run()
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, "goleak:", err)
			code = 1
		}
	}
	return code
}

type fakeKey struct{}

// TestScripts runs the command as people do, against a control plane in memory.
// Each script has its own, and in $HOME the contexts local (admin), operator,
// viewer and others that don't work.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Setup:               setupScript,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"backend": startBackend,
			"exits":   exits,
			"fake":    steerFake,
			"mode":    checkMode,
		},
	})
}

func setupScript(env *testscript.Env) error {
	authority, err := newFakeAuthority()
	if err != nil {
		return err
	}
	f, err := startFake(authority, "reseal")
	if err != nil {
		return err
	}
	env.Defer(f.server.Stop)
	env.Values[fakeKey{}] = f
	env.Setenv("HOME", env.WorkDir)
	env.Setenv("CONTROL_PLANE", f.address)
	env.Setenv("TZ", "UTC")
	// With the race detector each process would wait a second before it exits.
	env.Setenv("GORACE", "atexit_sleep_ms=0")
	// tcpmux: nothing listens there.
	env.Setenv("CLOSED", "127.0.0.1:1")
	certPEM, keyPEM, err := authority.issue("spiffe://reseal/admin/files", time.Now().Add(time.Hour))
	if err != nil {
		return err
	}
	for name, data := range map[string][]byte{"cert.pem": certPEM, "key.pem": keyPEM} {
		if err := os.WriteFile(filepath.Join(env.WorkDir, name), data, 0o600); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(env.WorkDir, "ca.pem")); err != nil {
		if err := os.WriteFile(filepath.Join(env.WorkDir, "ca.pem"), authority.pem, 0o600); err != nil {
			return err
		}
	}
	return writeScriptContexts(env, f)
}

func writeScriptContexts(env *testscript.Env, f *fakeServer) error {
	otherRoots, err := newFakeAuthority()
	if err != nil {
		return err
	}
	file := &contextFile{CurrentContext: "local"}
	for _, c := range []struct {
		name, uri, trustDomain string
		authority              *fakeAuthority
		roots                  []byte
		ends                   time.Duration
	}{
		{"local", "spiffe://reseal/admin/alice", "reseal", f.authority, f.authority.pem, time.Hour},
		{"operator", "spiffe://reseal/operator/oscar", "reseal", f.authority, f.authority.pem, time.Hour},
		{"viewer", "spiffe://reseal/viewer/vera", "reseal", f.authority, f.authority.pem, time.Hour},
		{"expired", "spiffe://reseal/admin/alice", "reseal", f.authority, f.authority.pem, -time.Hour},
		{"strange", "spiffe://reseal/admin/alice", "reseal", otherRoots, f.authority.pem, time.Hour},
		{"otherroots", "spiffe://reseal/admin/alice", "reseal", f.authority, otherRoots.pem, time.Hour},
		{"otherdomain", "spiffe://reseal/admin/alice", "example.org", f.authority, f.authority.pem, time.Hour},
	} {
		certPEM, keyPEM, err := c.authority.issue(c.uri, time.Now().Add(c.ends+30*time.Second))
		if err != nil {
			return err
		}
		file.put(namedContext{Name: c.name, ControlPlane: []string{f.address}, TrustDomain: c.trustDomain,
			CAPEM: string(c.roots), CertificatePEM: string(certPEM), PrivateKeyPEM: string(keyPEM)})
	}
	return writeContexts(filepath.Join(env.WorkDir, ".config", "reseal", "config.yaml"), file)
}

// exits runs a command and checks its exit code: exits CODE PROGRAM ARGS...
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits code program args...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	var exit *exec.ExitError
	if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// checkMode checks a file's permissions: mode OCTAL FILE.
func checkMode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mode octal file")
	}
	info, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%o", info.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s has mode %s, want %s", args[1], got, args[0])
	}
}

// steerFake changes the control plane: fake stop | unwell | alone | watched N.
// With fake renewing users can renew, fake renewals N says how often they did. Also
// fake silent, which sets $SILENT to an address that never answers, and fake
// certificate FILE NAME DOMAINS, which writes a Certificate. Of keyrings: fake
// stuck | damaged.
func steerFake(ts *testscript.TestScript, neg bool, args []string) {
	f := ts.Value(fakeKey{}).(*fakeServer)
	switch what := strings.Join(args, " "); {
	case what == "stop":
		f.server.Stop()
	case what == "alone":
		f.change(func() {
			f.unanswered = []*resealv1.UnansweredReplica{{Id: "c2", Address: "10.1.0.2:7443", Reason: "no answer within 2s"}}
		})
	case what == "renewing":
		f.change(func() { f.renewing = true })
	case args[0] == "renewals":
		want, err := strconv.Atoi(args[1])
		ts.Check(err)
		f.change(func() {
			if f.renewals != want {
				ts.Fatalf("%d renewals, want %d", f.renewals, want)
			}
		})
	case what == "unwell":
		f.change(func() { f.unwell = true })
	case what == "stuck":
		f.fakeKeyrings.set(func(k *fakeKeyrings) { k.stuck = true })
	case what == "damaged":
		f.fakeKeyrings.set(func(k *fakeKeyrings) { k.damaged = true })
	case what == "silent":
		silent, err := net.Listen("tcp", "127.0.0.1:0")
		ts.Check(err)
		ts.Defer(func() { silent.Close() })
		ts.Setenv("SILENT", silent.Addr().String())
	case args[0] == "certificate":
		ts.Check(f.writeCertificate(ts.MkAbs(args[1]), args[2], strings.Split(args[3], ",")))
	case args[0] == "watched":
		want, err := strconv.Atoi(args[1])
		ts.Check(err)
		waitFor(ts.Fatalf, "a watcher", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.watchers >= want
		})
	default:
		ts.Fatalf("fake %s: not known", what)
	}
}

func (f *fakeServer) writeCertificate(path, name string, domains []string) error {
	certPEM, keyPEM, err := f.authority.sign(&x509.Certificate{DNSNames: domains, NotAfter: time.Now().Add(2*time.Hour + 30*time.Second)})
	if err != nil {
		return err
	}
	var data bytes.Buffer
	err = manifest.FormatYAML(&data, &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec: &resealv1.Resource_Certificate{Certificate: &resealv1.Certificate{
			CertificatePem: string(certPEM), PrivateKeyPem: string(keyPEM)}},
	})
	if err != nil {
		return err
	}
	return os.WriteFile(path, data.Bytes(), 0o600)
}

func waitFor(fatalf func(string, ...any), what string, done func() bool) {
	for deadline := time.Now().Add(10 * time.Second); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			fatalf("waited too long for %s", what)
		}
	}
}
