package probe

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/peers"
	"github.com/reseal/reseal/integration/process"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	saysBare = "TLS 1.2: resumes by session ID when no ticket extension is sent (JSSE that chooses certificates by SNI); " +
		"Reseal does so by itself; HAProxy needs no-tls-tickets, nginx proxy_ssl_conf_command Options -SessionTicket, " +
		"a Java service -Djdk.tls.server.enableSessionTicketExtension=false"
	saysOnce = "TLS 1.3: each ticket once, one per handshake"
)

// probePeer probes a server of package peers.
func probePeer(t *testing.T, start func(context.Context, peers.Options) (*peers.Backend, error), o peers.Options) *Report {
	t.Helper()
	var err error
	if o.Authority, err = peers.NewAuthority("root"); err != nil {
		t.Fatal(err)
	}
	o.Dir = t.TempDir()
	backend, err := start(t.Context(), o)
	if errors.Is(err, process.ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := backend.Stop(); err != nil {
			t.Error(err)
		}
	})
	return probe(t, Config{Address: backend.Address, ServerName: peers.ServerName, Roots: o.Authority.Pool(), Path: "/1k"})
}

// A stock Jetty whose certificate has two names: the whole truth about it, in
// both versions, is found out and said.
func TestStockJetty(t *testing.T) {
	report := probePeer(t, peers.Jetty, peers.Options{Mode: peers.TLS13, AnyVersion: true})
	old, current := version(t, report, tls12), version(t, report, tls13)
	if old.WithoutTicketExtension != answerYes || !old.EmptyTicket || old.Mechanism != resealv1.Mechanism_MECHANISM_SESSION_ID || old.Unresumed != "" || old.SingleUse != answerNo {
		t.Errorf("TLS 1.2: %v", old)
	}
	if current.SingleUse != answerYes || current.Tickets == 0 || current.TicketsResumed != 1 || current.WithoutTicketExtension != 0 {
		t.Errorf("TLS 1.3: %v", current)
	}
	for _, want := range []string{saysBare, saysOnce} {
		if !strings.Contains(report.Advice, want) {
			t.Errorf("%q is not in %q", want, report.Advice)
		}
	}
	checkBareConnections(t, report)
}

// checkBareConnections: the capture shows that with the extension nothing was
// resumed in TLS 1.2, and without it something.
func checkBareConnections(t *testing.T, report *Report) {
	t.Helper()
	bare := 0
	for _, c := range report.Connections {
		if c.GetAnswered().GetVersion() != tls12 || !c.GetResumed() {
			continue
		}
		if !c.GetOffered().GetWithoutTicketExtension() {
			t.Errorf("connection %d was resumed with the extension", c.Number)
		}
		bare++
	}
	if bare == 0 {
		t.Errorf("nothing was resumed:%s", describe(report))
	}
}

// With TLS 1.2 alone the sentence stands there too, with one on resumption.
func TestStockJettyOfTLS12(t *testing.T) {
	report := probePeer(t, peers.Jetty, peers.Options{Mode: peers.TLS12Tickets})
	for _, want := range []string{saysBare, "Edges will speak TLS 1.2 and resume by session ID"} {
		if !strings.Contains(report.Advice, want) {
			t.Errorf("%q is not in %q", want, report.Advice)
		}
	}
	checkBareConnections(t, report)
}

// Servers that resume with the extension are not said to need it gone.
func TestNotWithoutTicketExtension(t *testing.T) {
	for name, test := range map[string]struct {
		start func(context.Context, peers.Options) (*peers.Backend, error)
		mode  peers.Mode
		how   resealv1.Mechanism
	}{
		"Jetty with one name": {peers.JettyOneName, peers.TLS12Tickets, resealv1.Mechanism_MECHANISM_TICKET},
		"session IDs alone":   {peers.OpenSSL, peers.TLS12SessionIDs, resealv1.Mechanism_MECHANISM_SESSION_ID},
		"nginx, tickets off":  {peers.Nginx, peers.TLS12SessionIDs, resealv1.Mechanism_MECHANISM_SESSION_ID},
	} {
		t.Run(name, func(t *testing.T) {
			report := probePeer(t, test.start, peers.Options{Mode: test.mode})
			if v := version(t, report, tls12); v.WithoutTicketExtension != answerNo || v.EmptyTicket || v.Mechanism != test.how {
				t.Errorf("%v", v)
			}
			if strings.Contains(report.Advice, "ticket extension") {
				t.Error(report.Advice)
			}
		})
	}
}

// A server without sessions has none without the extension either.
func TestNoSessionsWithoutTicketExtension(t *testing.T) {
	report := probePeer(t, peers.Nginx, peers.Options{Mode: peers.TLS12Tickets, NoSessions: true})
	v := version(t, report, tls12)
	if v.Mechanism != 0 || v.Unresumed == "" || v.WithoutTicketExtension == answerYes || strings.Contains(report.Advice, "ticket extension") {
		t.Errorf("%v: %s", v, report.Advice)
	}
}

// What the handshaker without the extension does with a key log that it does not
// know.
func TestMasterSecret(t *testing.T) {
	if _, err := masterSecret([]byte("CLIENT_RANDOM 00 0102\n")); err != nil {
		t.Error(err)
	}
	for _, log := range []string{"", "CLIENT_RANDOM 00", "OTHER 00 01", "CLIENT_RANDOM 00 0x"} {
		if _, err := masterSecret([]byte(log)); err == nil {
			t.Errorf("%q: no error", log)
		}
	}
}
