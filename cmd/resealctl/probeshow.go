package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/reseal/reseal/proto/manifest"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func (p *probeRun) print(report *resealv1.ProbeReport) error {
	if p.ca != "" && report.GetPool() != nil {
		report.Pool.Tls.Trust = &resealv1.BackendTLS_Trust{Roots: &resealv1.BackendTLS_Trust_CaFile{CaFile: p.ca}}
	}
	if report.GetPool() != nil && p.insecure {
		report.Pool.Tls.InsecureSkipVerify = true
	}
	if p.format.structured() {
		return p.printDocument(p.format, protoView{report.ProtoReflect()})
	}
	p.printSummary(report)
	p.printTLS(report)
	p.printSurvivals(report)
	p.printAddresses(report)
	p.printConnections(report)
	return p.printAdvice(report)
}

func (p *probeRun) printSummary(r *resealv1.ProbeReport) {
	d := describer{w: p.out}
	from := "this machine"
	if p.edge != "" {
		from = "edge " + p.edge
	}
	d.line(0, "Backend", r.GetAddress())
	d.line(0, "Probed from", fmt.Sprintf("%s, %d connections in %s", from, len(r.GetConnections()), took(r.GetTook())))
	d.line(0, "SNI", orNone(r.GetServerName()))
	d.line(0, "ALPN", orNone(r.GetAlpn()))
	if first := r.GetAddresses(); len(first) > 0 {
		d.line(0, "Certificate", fmt.Sprintf("%s, for %s, expires %s", orNone(first[0].GetSubject()),
			joinSome(first[0].GetNames(), 5), stamp(first[0].GetExpiresAt())))
	}
	d.line(0, "Keep-alive", keepAliveLine(r.GetKeepAlive()))
	for i, note := range r.GetNotes() {
		key := ""
		if i == 0 {
			key = "Notes"
		}
		d.line(0, key, note)
	}
	d.flush()
}

func keepAliveLine(k *resealv1.ProbeKeepAlive) string {
	text := answerWord(k.GetReusable())
	if k.GetConnection() != "" {
		text += ", Connection: " + k.GetConnection()
	}
	if k.GetKeepAlive() != "" {
		text += ", Keep-Alive: " + k.GetKeepAlive()
	}
	if k.GetIdle() != nil {
		verb := "still open after "
		if k.GetClosed() {
			verb = "closed after "
		}
		text += ", " + verb + took(k.GetIdle()) + " idle"
	}
	if k.GetNote() != "" {
		text += " (" + k.GetNote() + ")"
	}
	return text
}

// took is a measured time, rounded for reading.
func took(d *durationpb.Duration) string {
	value := d.AsDuration()
	switch {
	case value >= 10*time.Second:
		return value.Round(time.Second).String()
	case value >= time.Second:
		return value.Round(100 * time.Millisecond).String()
	}
	return value.Round(time.Millisecond).String()
}

func answerWord(a resealv1.ProbeAnswer) string {
	switch a {
	case resealv1.ProbeAnswer_PROBE_ANSWER_UNSPECIFIED:
		return "not tried"
	case resealv1.ProbeAnswer_PROBE_ANSWER_MIXED:
		return "sometimes"
	}
	return resealv1.Label(a)
}

// versionWord is "TLS 1.3".
func versionWord(v resealv1.TLSVersion) string {
	if v == 0 {
		return "another version"
	}
	return "TLS " + strings.TrimPrefix(resealv1.Label(v), "tls")
}

func (p *probeRun) printTLS(r *resealv1.ProbeReport) {
	p.printf("\n")
	t := newTable(p.out, "VERSION", "RESUMES BY", "TICKETS", "LIFETIME", "SINGLE USE", "CIPHER SUITE", "KEY EXCHANGE")
	for _, v := range r.GetVersions() {
		if !v.GetSupported() {
			t.add(versionWord(v.GetVersion()), "no handshake: "+strings.TrimPrefix(v.GetError(), "tls: "), "", "", "", "", "")
			continue
		}
		how := mechanismWords[v.GetMechanism()]
		if how == "" {
			how = "nothing: " + v.GetUnresumed()
		}
		if v.GetWithoutTicketExtension() == resealv1.ProbeAnswer_PROBE_ANSWER_YES {
			how += ", only without ticket extension"
		}
		tickets := fmt.Sprint(v.GetTickets())
		if v.GetEmptyTicket() && v.GetTickets() == 0 {
			tickets += ", an empty one"
		}
		if v.GetTicketsResumed() > 0 {
			tickets += fmt.Sprintf(", %d resumed", v.GetTicketsResumed())
		}
		lifetime := "-"
		if v.GetLifetimeHint() != nil {
			lifetime = shortDuration(v.GetLifetimeHint().AsDuration())
		}
		t.add(versionWord(v.GetVersion()), how, tickets, lifetime, answerWord(v.GetSingleUse()), v.GetCipherSuite(), v.GetCurve())
	}
	t.flush()
}

// mechanismWords are the ways to resume, as sentences say them.
var mechanismWords = map[resealv1.Mechanism]string{
	resealv1.Mechanism_MECHANISM_SESSION_ID: "session ID",
	resealv1.Mechanism_MECHANISM_TICKET:     "ticket",
	resealv1.Mechanism_MECHANISM_PSK:        "PSK",
}

// endingWords are the ways in which a connection ends, as rows say them.
var endingWords = map[resealv1.ProbeEnding]string{
	resealv1.ProbeEnding_PROBE_ENDING_CLOSE_NOTIFY: "close_notify",
	resealv1.ProbeEnding_PROBE_ENDING_FIN:          "FIN without close_notify",
	resealv1.ProbeEnding_PROBE_ENDING_RESET:        "RST",
	resealv1.ProbeEnding_PROBE_ENDING_ABORT:        "abort during an answer",
	resealv1.ProbeEnding_PROBE_ENDING_PEER:         "the backend's own close",
	resealv1.ProbeEnding_PROBE_ENDING_IDLE:         "idle time",
}

func (p *probeRun) printSurvivals(r *resealv1.ProbeReport) {
	var versions []*resealv1.ProbeVersion
	for _, v := range r.GetVersions() {
		if len(v.GetSurvives()) > 0 {
			versions = append(versions, v)
		}
	}
	if len(versions) == 0 {
		return
	}
	headers := []string{"A SESSION LIVES THROUGH"}
	for _, v := range versions {
		headers = append(headers, versionWord(v.GetVersion()))
	}
	p.printf("\n")
	t := newTable(p.out, headers...)
	var notes []string
	for number := range int32(len(resealv1.ProbeEnding_name)) {
		ending := resealv1.ProbeEnding(number)
		cells, any := []string{endingWords[ending]}, false
		for _, v := range versions {
			i := slices.IndexFunc(v.GetSurvives(), func(s *resealv1.ProbeSurvival) bool { return s.GetEnding() == ending })
			if i < 0 {
				cells = append(cells, "not tried")
				continue
			}
			s := v.GetSurvives()[i]
			any = true
			cells = append(cells, fmt.Sprintf("%s (%d of %d resumed)", answerWord(s.GetAnswer()), s.GetResumed(), s.GetTried()))
			if ending == resealv1.ProbeEnding_PROBE_ENDING_IDLE {
				cells[0] = s.GetNote() + " idle"
			} else if note := endingWords[ending] + ": " + s.GetNote(); s.GetNote() != "" && !slices.Contains(notes, note) {
				notes = append(notes, note)
			}
		}
		if any {
			t.add(cells...)
		}
	}
	t.flush()
	for _, note := range notes {
		p.printf("Note: %s.\n", printable(note))
	}
}

func (p *probeRun) printAddresses(r *resealv1.ProbeReport) {
	if len(r.GetAddresses()) < 2 {
		return
	}
	p.printf("\n")
	t := newTable(p.out, "ADDRESS", "TAKES SESSIONS OF THE FIRST", "CERTIFICATE", "SUBJECT")
	for i, address := range r.GetAddresses() {
		takes, certificate := answerWord(address.GetShares()), address.GetCertificate()
		if i == 0 {
			takes = "-"
		}
		if address.GetError() != "" {
			takes = "failed: " + address.GetError()
		}
		t.add(address.GetAddress(), takes, orNone(certificate[:min(16, len(certificate))]), orNone(address.GetSubject()))
	}
	t.flush()
}

func (p *probeRun) printConnections(r *resealv1.ProbeReport) {
	p.printf("\n")
	headers := []string{"#", "PURPOSE", "CLIENT HELLO", "SERVER HELLO", "HANDSHAKE", "TICKETS", "ENDED BY"}
	several := len(r.GetAddresses()) > 1
	if several {
		headers = slices.Insert(headers, 1, "ADDRESS")
	}
	t := newTable(p.out, headers...)
	for _, c := range r.GetConnections() {
		handshake := "full"
		switch {
		case c.GetEnding() == 0:
			handshake = "failed"
		case c.GetResumed():
			handshake = "resumed"
		}
		cells := []string{fmt.Sprint(c.GetNumber()), c.GetPurpose(), offeredText(c.GetOffered()), answeredText(c), handshake,
			fmt.Sprint(c.GetTickets()), endedBy(c)}
		if several {
			cells = slices.Insert(cells, 1, c.GetAddress())
		}
		t.add(cells...)
	}
	t.flush()
}

func endedBy(c *resealv1.ProbeConnection) string {
	if c.GetEnding() == 0 {
		return c.GetError()
	}
	text := endingWords[c.GetEnding()]
	if kind := resealv1.Label(c.GetClose()); kind != "" && c.GetClose() != resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH &&
		c.GetClose() != resealv1.CloseKind_CLOSE_KIND_RESET_BY_US {
		text += ", " + kind
	}
	if c.GetError() != "" {
		text += ": " + c.GetError()
	}
	return text
}

// offeredText says what a ClientHello offered. A random session ID offers
// nothing.
func offeredText(h *resealv1.ProbeClientHello) string {
	if h == nil {
		return "-"
	}
	text := versionWord(h.GetVersion())
	switch {
	case h.GetPsk() != "":
		return text + ", psk " + h.GetPsk()
	case h.GetTicket() != "":
		return text + ", ticket " + h.GetTicket()
	case h.GetSessionIdGiven() && h.GetWithoutTicketExtension():
		return text + ", no ticket extension, session ID " + h.GetSessionId()
	case h.GetSessionIdGiven():
		return text + ", session ID " + h.GetSessionId()
	}
	return text + ", no session"
}

// answeredText says what a ServerHello answered to that.
func answeredText(c *resealv1.ProbeConnection) string {
	h := c.GetAnswered()
	if h == nil {
		return "none"
	}
	text := versionWord(h.GetVersion())
	switch {
	case h.GetVersion() == resealv1.TLSVersion_TLS_VERSION_TLS1_3 && h.GetPsk():
		text += ", psk taken"
	case h.GetVersion() == resealv1.TLSVersion_TLS_VERSION_TLS1_3:
		text += ", no psk"
	case h.GetSessionId() == "":
		text += ", no session ID"
	case h.GetEchoed():
		text += ", the same ID echoed"
	default:
		text += ", new session ID " + h.GetSessionId()
	}
	if h.GetRetried() {
		text += ", after a retry"
	}
	return text
}

// printAdvice writes the paragraph and the spec that it leads to.
func (p *probeRun) printAdvice(r *resealv1.ProbeReport) error {
	p.printf("\n")
	p.paragraph("", r.GetAdvice())
	if r.GetPool() == nil {
		return nil
	}
	name := p.pool
	if name == "" {
		name = "backend"
	}
	p.printf("\n")
	return manifest.FormatYAML(p.out, &resealv1.Resource{
		Metadata: &resealv1.Metadata{Name: name},
		Spec:     &resealv1.Resource_BackendPool{BackendPool: r.GetPool()},
	})
}

// paragraph writes text in lines of at most textWidth, each after indent.
func (a *app) paragraph(indent, text string) {
	a.printf("%s", wrap(printable(text), indent))
}
