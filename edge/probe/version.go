package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

const (
	answerYes   = resealv1.ProbeAnswer_PROBE_ANSWER_YES
	answerNo    = resealv1.ProbeAnswer_PROBE_ANSWER_NO
	answerMixed = resealv1.ProbeAnswer_PROBE_ANSWER_MIXED

	endNotify = resealv1.ProbeEnding_PROBE_ENDING_CLOSE_NOTIFY
	endFIN    = resealv1.ProbeEnding_PROBE_ENDING_FIN
	endReset  = resealv1.ProbeEnding_PROBE_ENDING_RESET
	endAbort  = resealv1.ProbeEnding_PROBE_ENDING_ABORT
	endPeer   = resealv1.ProbeEnding_PROBE_ENDING_PEER
)

// first is the address that gets the whole probe.
func (r *run) first() *target { return r.targets[0] }

// discover makes the first handshake, which may end in any version and
// protocol, with the first address that answers.
func (r *run) discover(ctx context.Context) error {
	r.alpn = []string{"h2", "http/1.1"}
	if r.cfg.TLS != nil {
		r.alpn = r.base.NextProtos
	}
	var failures []error
	for i, to := range r.targets {
		l, err := r.connect(ctx, r.newChain(0, &resealv1.ProbeVersion{}), to, "what is chosen when all is offered")
		if err != nil {
			to.facts.Error = err.Error()
			failures = append(failures, err)
			if errors.Is(err, errEnough) || ctx.Err() != nil {
				break
			}
			continue
		}
		r.report.Alpn = l.state.NegotiatedProtocol
		l.settle()
		l.end(endNotify)
		// The one that answered is the first from here on.
		r.targets = slices.Insert(slices.Delete(r.targets, i, i+1), 0, to)
		r.report.Addresses = slices.Insert(slices.Delete(r.report.Addresses, i, i+1), 0, to.facts)
		if r.http {
			r.alpn = []string{"http/1.1"}
		} else if r.report.Alpn != "" {
			r.alpn = []string{r.report.Alpn}
		}
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if old := r.oldVersion(ctx); old != "" {
		return fmt.Errorf("%s speaks %s and nothing newer, and edges need TLS 1.2 or 1.3", r.cfg.Address, old)
	}
	return errors.Join(failures...)
}

// oldVersion is the version of a server that speaks none that edges speak, or
// "" when it does not even do that.
func (r *run) oldVersion(ctx context.Context) string {
	record := r.report.Connections[len(r.report.Connections)-1]
	if !strings.Contains(record.GetError(), "protocol version") {
		return ""
	}
	versions := r.base
	defer func() { r.base = versions }()
	r.base = versions.Clone()
	r.base.MinVersion, r.base.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
	l, err := r.connect(ctx, r.newChain(0, &resealv1.ProbeVersion{}), r.first(), "older versions")
	if err != nil {
		return ""
	}
	defer l.end(endNotify)
	return tls.VersionName(l.state.Version)
}

// probeVersion finds out everything about one version at the first address.
func (r *run) probeVersion(ctx context.Context, version uint16) error {
	facts := &resealv1.ProbeVersion{Version: versionOf(version)}
	r.report.Versions = append(r.report.Versions, facts)
	c := r.newChain(version, facts)
	l, err := r.firstConnection(ctx, c)
	if err != nil {
		if errors.Is(err, errEnough) || ctx.Err() != nil {
			return err
		}
		facts.Error = cause(err)
		return nil
	}
	facts.Supported = true
	facts.CipherSuite = tls.CipherSuiteName(l.state.CipherSuite)
	if l.state.CurveID != 0 {
		facts.Curve = l.state.CurveID.String()
	}
	r.firstOf(l)
	facts.Mechanism, facts.Unresumed = c.promise(l)
	if facts.Mechanism != 0 {
		r.chains = append(r.chains, c)
		err = r.runChain(ctx, c, l.record.Ending)
		r.conclude(c)
	}
	if err == nil && version == tls.VersionTLS12 {
		err = r.probeBare(ctx, c)
	}
	return err
}

// firstConnection makes the first connection of a version.
func (r *run) firstConnection(ctx context.Context, c *chain) (*link, error) {
	purpose := "first with " + tls.VersionName(c.version)
	l, err := r.connect(ctx, c, r.first(), purpose)
	if err != nil && r.http && r.report.Alpn != "" && strings.Contains(err.Error(), "no application protocol") {
		r.alpn, r.http = []string{r.report.Alpn}, false
		r.note("the backend takes no HTTP/1.1, only %s: only handshakes were tried", r.report.Alpn)
		return r.connect(ctx, c, r.first(), purpose)
	}
	return l, err
}

// cause is an error without the address that the report names anyway.
func cause(err error) string {
	if inner := errors.Unwrap(err); inner != nil {
		err = inner
	}
	return bare(err).Error()
}

// firstOf uses and ends the first connection of a version.
func (r *run) firstOf(l *link) {
	switch {
	case r.http && r.report.KeepAlive.Status == 0:
		l.keepAlive()
	case r.http && !r.closes:
		l.use()
	}
	if !r.http || r.closes && l.record.Requests == 0 {
		l.settle()
	}
	switch {
	case l.cut:
		// Waiting for the answer to close_notify would mean reading on.
		l.end(endAbort)
	case l.record.Requests > 0 && r.closes && l.gone():
		l.end(endPeer)
	default:
		l.end(endNotify)
	}
	l.chain.facts.Tickets = l.record.Tickets
	if hint := l.chain.hinted; hint > 0 {
		l.chain.facts.LifetimeHint = durationpb.New(hint)
	}
}

// promise is how sessions of the first connection might be resumed, or why they
// can't be.
func (c *chain) promise(l *link) (resealv1.Mechanism, string) {
	switch {
	case c.version == tls.VersionTLS13 && l.record.Tickets == 0:
		return 0, "it gives out no tickets"
	case c.version == tls.VersionTLS13:
		return resealv1.Mechanism_MECHANISM_PSK, ""
	case l.record.Tickets > 0:
		return resealv1.Mechanism_MECHANISM_TICKET, ""
	case len(l.flight.sessionID) == 0:
		return 0, noSessions
	case len(l.flight.sessionID) != offeredIDSize:
		return 0, fmt.Sprintf("its session IDs have %d bytes, and only IDs of %d bytes can be offered", len(l.flight.sessionID), offeredIDSize)
	case c.handshaker == nil:
		return 0, "it gives out session IDs, and resumption by ID was not tried"
	}
	return resealv1.Mechanism_MECHANISM_SESSION_ID, ""
}

const noSessions = "it gives out neither a session ID nor a ticket"

// runChain ends each connection in another way and offers its session on the
// next one. first is how the connection before ended.
func (r *run) runChain(ctx context.Context, c *chain, first resealv1.ProbeEnding) error {
	plan := []resealv1.ProbeEnding{endNotify, endNotify, endFIN, endReset}
	if c.version == tls.VersionTLS12 {
		plan = plan[1:] // there is no need to find out whether tickets are single-use
	}
	if r.http {
		plan = append(plan, endAbort)
	}
	plan = append(plan, endNotify)
	again := 1 // where a ticket is offered again: after two clean ends
	if first == endAbort {
		plan, again = slices.Insert(plan, 0, endNotify), 2
	}
	before, note := first, ""
	repeated := map[resealv1.ProbeEnding]bool{}
	for i := 0; i < len(plan); i++ {
		reoffer := i == again && c.version == tls.VersionTLS13 && c.again()
		purpose := "after " + endingWords[before]
		if reoffer {
			purpose = "the same ticket again"
		}
		l, err := r.connect(ctx, c, r.first(), purpose)
		if err != nil {
			return err
		}
		if reoffer {
			c.reoffered(l)
		} else if !c.survived(before, l, note) && !repeated[before] {
			// Once may be chance: end another one the same way.
			repeated[before] = true
			plan = slices.Insert(plan, len(plan)-1, before)
		}
		if c.hopeless() {
			l.end(endNotify)
			return nil
		}
		if plan[i] == endPeer {
			plan[i] = endNotify // the server's own doing can't be asked for
		}
		before = plan[i]
		if note, err = l.finish(before); err != nil {
			r.note("%s: %s was not tried: %v", tls.VersionName(c.version), endingWords[before], err)
		}
		before = l.record.Ending
		if l.record.Resumed {
			c.facts.TicketsResumed = max(c.facts.TicketsResumed, l.record.Tickets)
		}
	}
	return nil
}

// finish uses and ends a connection.
func (l *link) finish(how resealv1.ProbeEnding) (note string, err error) {
	if how == endAbort {
		return l.abort()
	}
	l.use()
	if !l.end(how) {
		return "", errCantReset
	}
	return "", nil
}

var endingWords = map[resealv1.ProbeEnding]string{
	endNotify: "close_notify",
	endFIN:    "FIN without close_notify",
	endReset:  "RST",
	endAbort:  "an abort during an answer",
	endPeer:   "the server's own close",
}

// survived notes whether the session that was left by ending was resumed. It
// returns false only when it was offered and declined.
func (c *chain) survived(ending resealv1.ProbeEnding, l *link, note string) bool {
	if !l.offered() {
		return true // nothing was tried
	}
	i := slices.IndexFunc(c.facts.Survives, func(s *resealv1.ProbeSurvival) bool { return s.Ending == ending })
	if i < 0 {
		i = len(c.facts.Survives)
		c.facts.Survives = append(c.facts.Survives, &resealv1.ProbeSurvival{Ending: ending, Note: note})
	}
	found := c.facts.Survives[i]
	found.Tried++
	if l.record.Resumed {
		found.Resumed++
	}
	found.Answer = answerOf(found.Resumed, found.Tried)
	return l.record.Resumed
}

func answerOf(part, all uint32) resealv1.ProbeAnswer {
	switch part {
	case all:
		return answerYes
	case 0:
		return answerNo
	}
	return answerMixed
}

// reoffered notes whether a ticket was taken a second time.
func (c *chain) reoffered(l *link) {
	if c.facts.SingleUse = answerYes; l.record.Resumed {
		c.facts.SingleUse = answerNo
	}
}

// survival is what is known about an ending, or an empty answer.
func survival(facts *resealv1.ProbeVersion, ending resealv1.ProbeEnding) *resealv1.ProbeSurvival {
	for _, s := range facts.Survives {
		if s.Ending == ending {
			return s
		}
	}
	return &resealv1.ProbeSurvival{Ending: ending}
}

// hopeless says that sessions are declined even when all went well.
func (c *chain) hopeless() bool {
	var tried, resumed uint32
	for _, s := range c.facts.Survives {
		tried, resumed = tried+s.Tried, resumed+s.Resumed
	}
	return tried >= 3 && resumed == 0
}

// conclude says what the chain has shown.
func (r *run) conclude(c *chain) {
	if c.facts.SingleUse == 0 {
		c.facts.SingleUse = c.reuse()
	}
	var tried, resumed uint32
	for _, s := range c.facts.Survives {
		tried, resumed = tried+s.Tried, resumed+s.Resumed
	}
	if tried > 0 && resumed == 0 {
		c.facts.Mechanism = 0
		c.facts.Unresumed = "it gives out sessions and declines every one of them"
		r.chains = slices.DeleteFunc(r.chains, func(other *chain) bool { return other == c })
	}
	slices.SortStableFunc(c.facts.Survives, func(a, b *resealv1.ProbeSurvival) int { return int(a.Ending) - int(b.Ending) })
}
