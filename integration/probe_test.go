package integration

import (
	"slices"
	"strings"
	"testing"

	"github.com/reseal/reseal/integration/harness"
	"github.com/reseal/reseal/integration/peers"
)

// probed is `resealctl probe -o json`.
type probed struct {
	Versions  []probedVersion `json:"versions"`
	KeepAlive struct {
		Reusable string `json:"reusable"`
		Status   int    `json:"status"`
	} `json:"keepAlive"`
	Advice string `json:"advice"`
}

type probedVersion struct {
	Version        string `json:"version"`
	Supported      bool   `json:"supported"`
	Error          string `json:"error"`
	Mechanism      string `json:"mechanism"`
	Unresumed      string `json:"unresumed"`
	Tickets        int    `json:"tickets"`
	TicketsResumed int    `json:"ticketsResumed"`
	SingleUse      string `json:"singleUse"`
	Survives       []struct {
		Ending  string `json:"ending"`
		Answer  string `json:"answer"`
		Tried   int    `json:"tried"`
		Resumed int    `json:"resumed"`
	} `json:"survives"`
}

// What sessions live through, as "ending answer".
var (
	livesOn = []string{"close_notify yes", "fin yes", "reset yes", "abort yes"}
	strict  = []string{"close_notify yes", "fin no", "reset no", "abort no"}
	// closing is for backends that end each connection themselves.
	closing = "peer yes"
)

// TestProbe probes real backends in their modes.
func TestProbe(t *testing.T) {
	w := newWorldOf(t, harness.NewShipped(t))
	w.StartControlPlane() // resealctl of the harness names one
	ca := w.WriteFile("ca.pem", string(w.Authority.PEM()))
	for _, test := range []struct {
		name    string
		start   launcher
		options peers.Options
		// What the version that the backend has is found to do.
		mechanism        string
		tickets, resumed int // tickets of a full and of a resumed handshake
		singleUse        string
		survives         []string
		keepAlive        string
		advice           []string // that must be named
	}{
		{
			"jetty ids", peers.JettyArranged, peers.Options{Mode: peers.TLS12SessionIDs}, "session_id", 0, 0, "no", livesOn, "yes",
			[]string{"by session ID", "sessions.mode: auto", "sessions.sharing: fleet", "connections.reuse: always"},
		},
		{
			"jetty ids strict", peers.JettyArranged, peers.Options{Mode: peers.TLS12SessionIDs, Strict: true}, "session_id", 0, 0, "no", strict, "yes",
			[]string{"forgets a session after FIN without close_notify, RST or an abort", "connections.closeTimeout"},
		},
		{
			"jetty ids strict long", peers.JettyArranged, peers.Options{Mode: peers.TLS12SessionIDs, Strict: true}, "session_id", 0, 0, "no", strict, "",
			[]string{"abort during an answer"},
		},
		{
			"jetty ids closing", peers.JettyArranged, peers.Options{Mode: peers.TLS12SessionIDs, CloseEach: true}, "session_id", 0, 0, "no",
			[]string{closing}, "no", []string{"closes the connection after each answer"},
		},
		{
			// It renews the ticket with each resumption, so none is offered twice.
			"jetty tickets", peers.JettyArranged, peers.Options{Mode: peers.TLS12Tickets}, "ticket", 1, 1, "", livesOn, "yes",
			[]string{"by ticket", "sessions.mode: auto"},
		},
		{
			"jetty tls13", peers.JettyArranged, peers.Options{Mode: peers.TLS13}, "psk", 1, 1, "no", livesOn, "yes",
			[]string{"TLS 1.3", "sessions.mode: auto"},
		},
		{
			"jetty tls13 closing", peers.JettyArranged, peers.Options{Mode: peers.TLS13, CloseEach: true}, "psk", 1, 1, "no",
			[]string{closing}, "no", []string{"closes the connection after each answer"},
		},
		{
			"jetty tls13 stateful", peers.JettyArranged, peers.Options{Mode: peers.TLS13, Stateful: true}, "psk", 1, 1, "yes", nil, "yes",
			[]string{"TLS 1.3: each ticket once, one per handshake"},
		},
		{
			"jetty stock", peers.Jetty, peers.Options{Mode: peers.TLS12Tickets}, "session_id", 0, 0, "no", []string{"close_notify yes"}, "yes",
			[]string{"TLS 1.2: resumes by session ID when no ticket extension is sent (JSSE that chooses certificates by SNI); Reseal does so by itself; " +
				"HAProxy needs no-tls-tickets, nginx proxy_ssl_conf_command Options -SessionTicket, a Java service -Djdk.tls.server.enableSessionTicketExtension=false"},
		},
		{
			"jetty stock tls13", peers.Jetty, peers.Options{Mode: peers.TLS13}, "psk", 2, 1, "yes", []string{"close_notify yes"}, "yes",
			[]string{"TLS 1.3: each ticket once, one per handshake"},
		},
		{"openssl tls13", peers.OpenSSL, peers.Options{Mode: peers.TLS13}, "psk", 2, 1, "no", livesOn, "no", []string{"TLS 1.3"}},
		{"openssl tickets", peers.OpenSSL, peers.Options{Mode: peers.TLS12Tickets}, "ticket", 1, 0, "no", nil, "no", []string{"by ticket"}},
		{
			"openssl none", peers.OpenSSL, peers.Options{Mode: peers.TLS12Tickets, NoSessions: true}, "", 0, 0, "", nil, "no",
			[]string{"No session is resumed", "switch session IDs or tickets on"},
		},
		{"nginx ids", peers.Nginx, peers.Options{Mode: peers.TLS12SessionIDs}, "session_id", 0, 0, "no", livesOn, "yes", []string{"by session ID"}},
		{"nginx tickets", peers.Nginx, peers.Options{Mode: peers.TLS12Tickets}, "ticket", 1, 0, "no", livesOn, "yes", []string{"by ticket"}},
		{"nginx tls13", peers.Nginx, peers.Options{Mode: peers.TLS13}, "psk", 2, 1, "no", livesOn, "yes", []string{"TLS 1.3"}},
		{
			// OpenSSL drops the session of a connection that failed.
			"haproxy ids", peers.HAProxy, peers.Options{Mode: peers.TLS12SessionIDs}, "session_id", 0, 0, "no",
			[]string{"close_notify yes", "reset no"}, "yes", []string{"by session ID", "forgets a session after", "connections.closeTimeout"},
		},
		{"haproxy tls13", peers.HAProxy, peers.Options{Mode: peers.TLS13}, "psk", 2, 1, "no", livesOn, "yes", []string{"TLS 1.3"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			backend := w.Launch(t, test.start, test.options)
			var report probed
			w.CtlJSON(&report, "probe", backend.Address, "--sni", peers.ServerName, "--ca", ca, "--path", pick(strings.HasSuffix(test.name, " long"), peers.Large, peers.Small))
			spoken := report.only(t)
			if want := pick(test.options.Mode == peers.TLS13, "tls1.3", "tls1.2"); spoken.Version != want {
				t.Errorf("speaks %s, want %s", spoken.Version, want)
			}
			if spoken.Mechanism != test.mechanism || spoken.Tickets != test.tickets || spoken.TicketsResumed != test.resumed || spoken.SingleUse != test.singleUse {
				t.Errorf("resumes by %q, tickets %d and %d, single use %q; want %q, %d and %d, %q (%s)", spoken.Mechanism, spoken.Tickets,
					spoken.TicketsResumed, spoken.SingleUse, test.mechanism, test.tickets, test.resumed, test.singleUse, spoken.Unresumed)
			}
			survives := spoken.survives(t)
			for _, want := range test.survives {
				if !slices.Contains(survives, want) {
					t.Errorf("a session lives through %q, want %q", survives, want)
				}
			}
			if report.KeepAlive.Reusable != test.keepAlive {
				t.Errorf("connections can be used again: %q, want %q", report.KeepAlive.Reusable, test.keepAlive)
			}
			for _, want := range test.advice {
				if !strings.Contains(report.Advice, want) {
					t.Errorf("no %q in the advice: %s", want, report.Advice)
				}
			}
		})
	}
}

// only is the one version that the backend has.
func (p probed) only(t *testing.T) probedVersion {
	t.Helper()
	versions := slices.DeleteFunc(slices.Clone(p.Versions), func(v probedVersion) bool { return !v.Supported })
	if len(p.Versions) != 2 || len(versions) != 1 {
		t.Fatalf("versions %+v, want one of two", p.Versions)
	}
	return versions[0]
}

func (v probedVersion) survives(t *testing.T) []string {
	t.Helper()
	var survives []string
	for _, s := range v.Survives {
		if s.Answer == "yes" && s.Resumed != s.Tried || s.Answer == "no" && s.Resumed != 0 || s.Tried == 0 {
			t.Errorf("%+v contradicts itself", s)
		}
		survives = append(survives, s.Ending+" "+s.Answer)
	}
	return survives
}
