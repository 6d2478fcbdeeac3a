package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// diagnosis is what statistics say about a pool's full handshakes. It is what
// -o json and yaml show.
type diagnosis struct {
	Pool       string         `json:"pool"`
	Since      string         `json:"since"` // "" is since each edge's start
	Full       uint64         `json:"full"`
	Resumed    uint64         `json:"resumed"`
	Needed     uint64         `json:"needed"`
	Excess     uint64         `json:"excess"`
	Identities identitiesView `json:"identities"`
	MainReason string         `json:"mainReason"` // "" without excess
	Sentences  []string       `json:"sentences"`
	Reasons    []reasonView   `json:"reasons"`
	Closes     []closeView    `json:"closes"`
	StaleEdges []string       `json:"staleEdges"`
	// ConnectionBudget is there when connections.maxPerFleet is.
	ConnectionBudget *connectionBudget `json:"connectionBudget,omitempty"`
}

// identitiesView is what the needed handshakes were counted from.
type identitiesView struct {
	Edges     int    `json:"edges"`
	Endpoints int    `json:"endpoints"`
	Scope     string `json:"scope"`
	Sharing   string `json:"sharing"`
}

type reasonView struct {
	Reason  string            `json:"reason"`
	Count   uint64            `json:"count"`
	Needed  uint64            `json:"needed"` // of the count
	Excess  uint64            `json:"excess"`
	Edges   map[string]uint64 `json:"edges"`
	Meaning string            `json:"meaning"`
	Advice  string            `json:"advice"`
}

type closeView struct {
	Kind    string            `json:"kind"`
	Count   uint64            `json:"count"`
	Clean   bool              `json:"clean"`
	Edges   map[string]uint64 `json:"edges"`
	Meaning string            `json:"meaning"`
}

// diagnose works out why a pool made full handshakes.
func diagnose(name, since string, pool *resealv1.BackendPool, stats *resealv1.GetStatsResponse) *diagnosis {
	total := poolStats(stats.GetPools(), name)
	edges := map[string]*resealv1.Stats{}
	for _, edge := range stats.GetEdges() {
		edges[edge.GetEdge()] = poolStats(edge.GetPools(), name)
	}
	d := &diagnosis{
		Pool: name, Since: since, Full: total.GetHandshakes().GetFull(), Resumed: resumedTotal(total.GetHandshakes()),
		Reasons: []reasonView{}, Closes: []closeView{}, StaleEdges: append([]string{}, stats.GetStaleEdges()...),
	}
	pool = pool.WithDefaults()
	d.need(pool, total, edges)
	d.reasons(total, edges)
	d.closes(total, edges)
	d.sentences(pool, total)
	d.budget(pool, stats)
	return d
}

func poolStats(all []*resealv1.Stats, name string) *resealv1.Stats {
	for _, s := range all {
		if s.GetName() == name {
			return s
		}
	}
	return &resealv1.Stats{}
}

// need counts the identities that handshakes were made with: each needs one full
// handshake. Those that made none need none.
func (d *diagnosis) need(pool *resealv1.BackendPool, total *resealv1.Stats, edges map[string]*resealv1.Stats) {
	for _, s := range edges {
		if h := s.GetHandshakes(); h.GetFull()+resumedTotal(h) > 0 {
			d.Identities.Edges++
		}
	}
	d.Identities.Edges = max(d.Identities.Edges, 1)
	d.Identities.Endpoints = max(len(pool.GetEndpoints()), 1)
	d.Identities.Scope = resealv1.Label(pool.GetSessions().GetScope())
	d.Identities.Sharing = resealv1.Label(pool.GetSessions().GetSharing())
	identities := 1
	if pool.GetSessions().GetScope() != resealv1.Sessions_SCOPE_POOL {
		identities *= d.Identities.Endpoints
	}
	if pool.GetSessions().GetSharing() != resealv1.Sessions_SHARING_FLEET {
		identities *= d.Identities.Edges
	}
	d.Needed = min(uint64(identities), firsts(total))
	d.Excess = d.Full - min(d.Needed, d.Full)
}

// firsts are the full handshakes that may have been the first of an identity.
func firsts(s *resealv1.Stats) uint64 {
	return s.GetMisses()[noSession] + s.GetMisses()[switchedOff]
}

const (
	noSession   = "no_session"
	switchedOff = "disabled"
	declined    = "declined"
	spent       = "single_use_spent"
)

func (d *diagnosis) reasons(total *resealv1.Stats, edges map[string]*resealv1.Stats) {
	free := d.Needed
	for _, label := range []string{noSession, switchedOff} {
		d.addReason(label, min(free, total.GetMisses()[label]), total, edges)
		free -= min(free, total.GetMisses()[label])
	}
	for label := range total.GetMisses() {
		if label != noSession && label != switchedOff {
			d.addReason(label, 0, total, edges)
		}
	}
	slices.SortFunc(d.Reasons, func(a, b reasonView) int {
		return cmp.Or(cmp.Compare(b.Excess, a.Excess), cmp.Compare(b.Count, a.Count), strings.Compare(a.Reason, b.Reason))
	})
	if len(d.Reasons) > 0 && d.Reasons[0].Excess > 0 {
		d.MainReason = d.Reasons[0].Reason
	}
}

func (d *diagnosis) addReason(label string, needed uint64, total *resealv1.Stats, edges map[string]*resealv1.Stats) {
	count := total.GetMisses()[label]
	if count == 0 {
		return
	}
	explained := explainMiss(missByLabel(label))
	if label == declined && total.GetMisses()[spent] > 0 {
		explained = explainSpent()
	}
	d.Reasons = append(d.Reasons, reasonView{
		Reason: label, Count: count, Needed: needed, Excess: count - needed,
		Edges:   perEdge(edges, func(s *resealv1.Stats) uint64 { return s.GetMisses()[label] }),
		Meaning: explained.meaning, Advice: explained.advice,
	})
}

// perEdge are the edges' own counts, without zeros.
func perEdge(edges map[string]*resealv1.Stats, count func(*resealv1.Stats) uint64) map[string]uint64 {
	counts := map[string]uint64{}
	for id, s := range edges {
		if n := count(s); n > 0 {
			counts[id] = n
		}
	}
	return counts
}

func (d *diagnosis) closes(total *resealv1.Stats, edges map[string]*resealv1.Stats) {
	for label, count := range total.GetCloses() {
		if count == 0 {
			continue
		}
		meaning, clean := explainClose(closeByLabel(label))
		d.Closes = append(d.Closes, closeView{
			Kind: label, Count: count, Clean: clean, Meaning: meaning,
			Edges: perEdge(edges, func(s *resealv1.Stats) uint64 { return s.GetCloses()[label] }),
		})
	}
	slices.SortFunc(d.Closes, func(a, b closeView) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(a.Kind, b.Kind))
	})
}

func (d *diagnosis) say(format string, args ...any) {
	d.Sentences = append(d.Sentences, fmt.Sprintf(format, args...))
}

// sentences say it in words.
func (d *diagnosis) sentences(pool *resealv1.BackendPool, total *resealv1.Stats) {
	when := "since its edges started"
	if d.Since != "" {
		when = "within the last " + d.Since
	}
	if d.Full+d.Resumed == 0 {
		d.say("Pool %s made no TLS handshake %s.", d.Pool, when)
		d.failures(total)
		return
	}
	d.say("Pool %s made %s %s, and %d needed to be: one for %s.", d.Pool, plural(d.Full, "full handshake"), when, d.Needed, d.identity())
	if pool.GetDns() != nil {
		d.say("Its endpoints come from DNS, and one address is counted: each further one needs one more.")
	}
	if d.Excess == 0 {
		d.say("That is no more than needed; %s resumed.", were(d.Resumed, "handshake"))
		d.failures(total)
		return
	}
	d.say("That is %d more than needed, %s%% of all %d handshakes.", d.Excess, percent(d.Excess, d.Full+d.Resumed), d.Full+d.Resumed)
	main := d.Reasons[0]
	text := fmt.Sprintf("The main reason is %s, with %d of the %d (%s%%)", main.Reason, main.Excess, d.Excess, percent(main.Excess, d.Excess))
	if where := mostOn(main.Edges); where != "" {
		text += ", " + where
	}
	d.say("%s.", text)
	d.say("%s", main.Meaning)
	d.evidence(main, pool, total)
	d.say("%s", main.Advice)
	d.failures(total)
}

// identity says what a session is for in this pool.
func (d *diagnosis) identity() string {
	endpoints, edges := plural(uint64(d.Identities.Endpoints), "endpoint"), plural(uint64(d.Identities.Edges), "edge")
	wholePool, wholeFleet := d.Identities.Scope == "pool", d.Identities.Sharing == "fleet"
	switch {
	case wholePool && wholeFleet:
		return "the whole pool and fleet (sessions.scope: pool, sharing: fleet)"
	case wholePool:
		return "each edge (" + edges + ", sessions.scope: pool)"
	case wholeFleet:
		return "each endpoint (" + endpoints + ", sessions.sharing: fleet)"
	}
	return "each endpoint and edge (" + endpoints + ", " + edges + ")"
}

// evidence adds what more the numbers say about the main reason.
func (d *diagnosis) evidence(main reasonView, pool *resealv1.BackendPool, total *resealv1.Stats) {
	unclean := map[string]uint64{}
	for _, c := range d.Closes {
		if !c.Clean {
			unclean[c.Kind] = c.Count
		}
	}
	switch main.Reason {
	case noSession:
		if pool.GetTls().GetServerName() == "" {
			d.say("spec.tls.serverName is empty, so each host of the requests has sessions of its own.")
		}
	case declined, resealv1.Label(resealv1.MissReason_MISS_REASON_DECLINED_AFTER_UNCLEAN_CLOSE):
		switch {
		case main.Reason == declined && total.GetMisses()[spent] > 0:
		case len(unclean) > 0:
			d.say("Connections that did not end in good order: %s.", counted(unclean))
		default:
			d.say("All connections ended in good order, so that is not why.")
		}
	}
	opened, byPeer := total.GetConnections().GetOpened(), total.GetClosesBy()["peer"]
	if opened > 0 && byPeer*2 > opened {
		d.say("The backend closes most connections itself: %d of the %d that were opened.", byPeer, opened)
	}
}

// budget says when connections.maxPerFleet can't be kept.
func (d *diagnosis) budget(pool *resealv1.BackendPool, stats *resealv1.GetStatsResponse) {
	d.ConnectionBudget = budgetOf(d.Pool, pool, stats)
	if b := d.ConnectionBudget; b != nil && b.exceeded() {
		d.say("Besides, connections.maxPerFleet is %d, but %d edges have the pool: each has a connection to each endpoint, so there may be %d. Raise it, or give the pool to fewer edges.",
			b.MaxPerFleet, len(b.Shares), b.SharedOut)
	}
}

func (d *diagnosis) failures(total *resealv1.Stats) {
	if failed := total.GetHandshakes().GetFailed(); failed > 0 {
		d.say("Besides, %s failed: see errors in resealctl stats pools %s, and try resealctl probe.", plural(failed, "handshake"), d.Pool)
	}
}

// mostOn says which edge has the largest part, if there are several.
func mostOn(edges map[string]uint64) string {
	if len(edges) == 0 {
		return ""
	}
	ids := slices.SortedFunc(maps.Keys(edges), func(a, b string) int {
		return cmp.Or(cmp.Compare(edges[b], edges[a]), strings.Compare(a, b))
	})
	if len(ids) == 1 {
		return "all on edge " + ids[0]
	}
	return fmt.Sprintf("most on edge %s (%d)", ids[0], edges[ids[0]])
}

func plural(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// were is "3 handshakes were" or "1 handshake was".
func were(n uint64, noun string) string {
	if n == 1 {
		return "1 " + noun + " was"
	}
	return plural(n, noun) + " were"
}
