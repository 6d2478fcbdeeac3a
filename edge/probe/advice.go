package probe

import (
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// adviser collects sentences and the spec that they lead to.
type adviser struct {
	report    *Report
	cfg       Config
	slowest   time.Duration
	spec      *resealv1.BackendPool
	sentences []string
}

func (a *adviser) say(format string, args ...any) {
	a.sentences = append(a.sentences, fmt.Sprintf(format, args...))
}

// advise says what the facts mean for a manifest.
func (r *run) advise() {
	a := &adviser{report: r.report, cfg: r.cfg, slowest: r.slowest, spec: &resealv1.BackendPool{
		Tls: &resealv1.BackendTLS{ServerName: r.cfg.ServerName},
	}}
	a.endpoints()
	a.resumption()
	a.ways()
	a.endings()
	a.sharing()
	a.keepAlive()
	a.protocol(r.http)
	r.report.Advice = strings.Join(a.sentences, " ")
	r.report.Pool = a.spec
}

func (a *adviser) endpoints() {
	host, port, _ := net.SplitHostPort(a.cfg.Address)
	if _, err := netip.ParseAddr(host); err == nil || len(a.report.Addresses) == 1 {
		a.spec.Endpoints = []*resealv1.Endpoint{{Address: a.cfg.Address}}
		return
	}
	number, _ := strconv.ParseUint(port, 10, 16)
	a.spec.Dns = &resealv1.DNSEndpoints{Name: host, Port: uint32(number)}
}

// preferred is the version that an edge will speak, and whether an older one
// would resume where it does not.
func (a *adviser) preferred() (newest, better *resealv1.ProbeVersion) {
	for _, version := range a.report.Versions {
		if !version.Supported {
			continue
		}
		if newest = version; version.Mechanism != 0 {
			better = version
		}
	}
	return newest, better
}

// ways says how a version resumes when that is not what clients expect, and what
// follows for them.
func (a *adviser) ways() {
	for _, version := range a.report.Versions {
		switch {
		case version.WithoutTicketExtension == answerYes:
			a.say("%s: resumes by session ID when no ticket extension is sent (JSSE that chooses certificates by SNI); Reseal does so by itself; HAProxy needs no-tls-tickets, nginx proxy_ssl_conf_command Options -SessionTicket, a Java service -Djdk.tls.server.enableSessionTicketExtension=false.", versionName(version))
		case version.SingleUse == answerYes && version.Version == resealv1.TLSVersion_TLS_VERSION_TLS1_3:
			a.say("%s: each ticket once, %s. Edges queue for the next when they have none.", versionName(version), ticketCount(version))
		}
	}
}

func (a *adviser) resumption() {
	newest, better := a.preferred()
	switch {
	case newest == nil:
		a.say("No version could be tried to the end.")
		return
	case newest.Mechanism == 0 && better != nil:
		a.say("Edges will speak %s, in which sessions are not resumed (%s); in %s they are, so a TLSPolicy with maxVersion: %s for this pool saves the full handshakes.",
			versionName(newest), newest.Unresumed, versionName(better), resealv1.Label(better.Version))
		return
	case newest.Mechanism == 0:
		a.say("No session is resumed (%s), so each connection costs a full handshake: switch session IDs or tickets on at the backend, or else keep connections open for a long time.", newest.Unresumed)
		return
	}
	a.say("Edges will speak %s and resume by %s: sessions.mode: auto, the default, is right.", versionName(newest), mechanismWords[newest.Mechanism])
	if newest.SingleUse == answerYes && newest.Version == resealv1.TLSVersion_TLS_VERSION_TLS1_2 {
		a.say("It takes each session once.")
	}
	if hint := newest.LifetimeHint.AsDuration(); hint > 0 && hint < 10*time.Minute {
		a.say("Its tickets live for only %s: after a longer pause the next connection costs a full handshake.", hint)
	}
	if idle := survival(newest, resealv1.ProbeEnding_PROBE_ENDING_IDLE); idle.Answer == answerNo {
		a.say("A session that was idle for %s was forgotten: give the backend a larger or longer-lived session cache.", idle.Note)
	}
	if notify := survival(newest, endNotify); notify.Answer == answerMixed {
		a.say("It resumed only %d of %d sessions whose connections were closed in good order: are there several servers behind this address that don't share their sessions? Then name each as an endpoint of its own, or give them common ticket keys.", notify.Resumed, notify.Tried)
	}
}

func ticketCount(version *resealv1.ProbeVersion) string {
	switch {
	case version.TicketsResumed == 1 && version.Tickets > 1:
		return fmt.Sprintf("one per handshake (%d with a full one)", version.Tickets)
	case version.TicketsResumed == 1:
		return "one per handshake"
	case version.TicketsResumed == 0:
		return fmt.Sprintf("%d with a full handshake", version.Tickets)
	}
	return fmt.Sprintf("%d with a full and %d with a resumed handshake", version.Tickets, version.TicketsResumed)
}

var mechanismWords = map[resealv1.Mechanism]string{
	resealv1.Mechanism_MECHANISM_SESSION_ID: "session ID",
	resealv1.Mechanism_MECHANISM_TICKET:     "ticket",
	resealv1.Mechanism_MECHANISM_PSK:        "pre-shared key (ticket)",
}

func versionName(version *resealv1.ProbeVersion) string {
	return "TLS " + strings.TrimPrefix(resealv1.Label(version.Version), "tls")
}

// endings says what the way in which connections end does to sessions.
func (a *adviser) endings() {
	newest, _ := a.preferred()
	if newest == nil || newest.Mechanism == 0 {
		return
	}
	var lost []string
	for _, ending := range []resealv1.ProbeEnding{endFIN, endReset, endAbort} {
		if answer := survival(newest, ending).Answer; answer == answerNo || answer == answerMixed {
			lost = append(lost, endingWords[ending])
		}
	}
	if len(lost) > 0 {
		a.say("The backend forgets a session after %s: edges send close_notify first and wait for the answer, for at most connections.closeTimeout, so keep that above what the backend needs. Clients and proxies that end connections otherwise cost it full handshakes.", either(lost))
	}
	silent := 0
	for _, connection := range a.report.Connections {
		if connection.Close == resealv1.CloseKind_CLOSE_KIND_TIMEOUT {
			silent++
		}
	}
	switch {
	case silent > 0:
		a.say("It did not end %d connections within %s of our close_notify: raise connections.closeTimeout or expect RSTs.", silent, a.cfg.CloseTimeout)
		a.connections().CloseTimeout = durationpb.New(5 * a.cfg.CloseTimeout)
	case a.slowest > a.cfg.CloseTimeout/2:
		a.say("It took up to %s to answer close_notify: connections.closeTimeout: %s leaves room.", a.slowest.Round(time.Millisecond), 3*a.cfg.CloseTimeout)
		a.connections().CloseTimeout = durationpb.New(3 * a.cfg.CloseTimeout)
	}
}

// either is "a, b or c".
func either(words []string) string {
	last := len(words) - 1
	if last < 1 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

func (a *adviser) connections() *resealv1.Connections {
	if a.spec.Connections == nil {
		a.spec.Connections = &resealv1.Connections{}
	}
	return a.spec.Connections
}

// sharing says who may use a session.
func (a *adviser) sharing() {
	newest, _ := a.preferred()
	if newest == nil || newest.Mechanism == 0 {
		return
	}
	switch a.report.Shared {
	case answerYes:
		a.say("All %d addresses take each other's sessions: sessions.scope: pool makes one full handshake do for all of them.", len(a.report.Addresses))
		a.spec.Sessions = &resealv1.Sessions{Scope: resealv1.Sessions_SCOPE_POOL}
	case answerNo:
		a.say("No address takes the sessions of another: leave sessions.scope: endpoint, or give the servers common ticket keys.")
	case answerMixed:
		a.say("Some addresses take each other's sessions and some don't: leave sessions.scope: endpoint.")
	}
	if a.report.SameCertificate == answerNo {
		a.say("The addresses show different certificates.")
	}
	if newest.SingleUse != answerYes {
		a.say("With several edges sessions.sharing: fleet lets a new one resume at once.")
	}
}

// keepAlive says how long connections can be kept.
func (a *adviser) keepAlive() {
	facts := a.report.KeepAlive
	switch facts.Reusable {
	case answerNo:
		a.say("It closes the connection after each answer: every request needs a handshake, so resumption is what counts; keep-alive at the backend would save even that.")
		return
	case answerYes:
		a.say("It keeps connections open: connections.reuse: always, the default, is right.")
	}
	seconds, requests := keepAliveHint(facts.KeepAlive)
	if facts.Closed {
		seconds = int(facts.Idle.AsDuration() / time.Second)
		a.say("It closed an idle connection after %s.", facts.Idle.AsDuration().Round(100*time.Millisecond))
	}
	if seconds <= 0 && requests <= 0 {
		return
	}
	a.say("It ends connections %s: stay below that, so that the edge is the one that closes.", keepAliveText(seconds, requests))
	if idle := time.Duration(seconds) * time.Second * 4 / 5; idle >= time.Second && idle < time.Minute {
		a.connections().IdleTimeout = durationpb.New(idle.Truncate(time.Second))
	}
	if requests > 1 {
		a.connections().MaxRequests = uint32(requests - 1)
	}
}

// keepAliveText says when connections end.
func keepAliveText(seconds, requests int) string {
	switch {
	case seconds > 0 && requests > 0:
		return fmt.Sprintf("after %d s or %d requests", seconds, requests)
	case seconds > 0:
		return fmt.Sprintf("after %d s", seconds)
	}
	return fmt.Sprintf("after %d requests", requests)
}

// keepAliveHint reads a Keep-Alive header: "timeout=5, max=100".
func keepAliveHint(header string) (seconds, requests int) {
	for part := range strings.SplitSeq(header, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(part), "=")
		number, err := strconv.ParseUint(strings.TrimSpace(value), 10, 31)
		if err != nil {
			continue
		}
		switch strings.ToLower(strings.TrimSpace(name)) {
		case "timeout":
			seconds = int(number)
		case "max":
			requests = int(number)
		}
	}
	return seconds, requests
}

// protocol says what to speak inside TLS.
func (a *adviser) protocol(http bool) {
	switch {
	case a.report.Alpn == "h2":
		a.say("It agrees to HTTP/2 by ALPN, which protocol: auto, the default, uses.")
	case !http && !a.cfg.NoRequests:
		a.say("It does not speak HTTP: use protocol: tcp with a listener of protocol tls.")
		a.spec.Protocol = resealv1.BackendPool_PROTOCOL_TCP
	}
}
