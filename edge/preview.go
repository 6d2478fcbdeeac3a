package edge

import (
	"context"
	"crypto/tls"
	"maps"
	"slices"
	"strings"

	"github.com/reseal/reseal/edge/exchange"
	"github.com/reseal/reseal/edge/feed"
	"github.com/reseal/reseal/edge/plan"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// maxImpacts bounds the pools and the listeners of a preview.
const maxImpacts = 1000

// preview finds out what a candidate would do, and does nothing. It does not hold up
// the owner of the configuration: it compiles a plan of its own and compares that with
// what the owner has published.
func (e *Edge) preview(_ context.Context, candidate feed.Candidate) *resealv1.EdgeImpact {
	impact := &resealv1.EdgeImpact{Unknown: "it failed at the preview, which is a bug; its log has the details"}
	e.guarded("a change was previewed", func() { impact = e.impactOf(candidate) })
	return impact
}

func (e *Edge) impactOf(candidate feed.Candidate) *resealv1.EdgeImpact {
	now := e.apply.inForce.Load()
	if now == nil {
		return &resealv1.EdgeImpact{Unknown: "it serves nothing yet"}
	}
	draft := plan.NewDraft(candidate.Snapshot, candidate.Unusable, plan.Env{ReadFile: e.files.Read}, nil)
	compiled := draft.Compile()
	impact := &resealv1.EdgeImpact{Violations: draft.Violations()}
	if compiled == nil {
		return impact
	}
	held := map[string]bool{} // keeps what it has
	for _, ref := range draft.HeldBack() {
		held[ref.Key()] = true
	}
	refused := e.frontend.Try(compiled.Listeners)
	for _, violation := range refused {
		held[violation.GetResource().Key()] = true
	}
	impact.Violations = append(impact.Violations, refused...)
	impact.Pools = e.poolImpacts(now.pools, compiled.Pools, held)
	impact.Listeners = e.listenerImpacts(compiled.Listeners, held)
	return impact
}

// poolImpacts compares the pools in force with those to come.
func (e *Edge) poolImpacts(pools []exchange.Pool, next map[string]*exchange.Pool, held map[string]bool) []*resealv1.PoolImpact {
	var impacts []*resealv1.PoolImpact
	for i := range pools {
		before, after := &pools[i], next[pools[i].Name]
		if held["BackendPool/"+before.Name] || len(impacts) == maxImpacts {
			continue
		}
		impact := &resealv1.PoolImpact{Name: before.Name}
		usage := e.backend.Usage(before.Name)
		switch {
		case after == nil:
			impact.Removed = true
			impact.Connections = total(usage.Open)
		case before.Identity != after.Identity:
			impact.Changes = identityChanges(before, after)
			impact.Connections = total(usage.Open)
			impact.FullHandshakes = e.fullHandshakes(before)
		default:
			impact.Connections = lostEndpoints(after, usage.Open)
		}
		if impact.Removed || len(impact.Changes) > 0 || impact.Connections > 0 {
			impacts = append(impacts, impact)
		}
	}
	return impacts
}

func total(open map[string]int) int64 {
	sum := 0
	for _, n := range open {
		sum += n
	}
	return int64(sum)
}

// lostEndpoints counts the connections to endpoints that a pool no longer names. Of
// endpoints from DNS it says nothing.
func lostEndpoints(after *exchange.Pool, open map[string]int) int64 {
	if after.Spec.GetDns() != nil {
		return 0
	}
	left := maps.Clone(open)
	for _, endpoint := range after.Spec.GetEndpoints() {
		delete(left, endpoint.GetAddress())
	}
	return total(left)
}

// fullHandshakes is about what it costs that no session of a pool can be resumed any
// more: one for each identity that has a session, since others wait for it, and one for
// each connection to an endpoint without, as with servers that resume nothing.
func (e *Edge) fullHandshakes(pool *exchange.Pool) int64 {
	usage := e.backend.Usage(pool.Name)
	counts := e.sessions.Identities(pool.Identity, usage.Places)
	cost := total(counts)
	for address, open := range usage.Open {
		if usage.Shared && cost == 0 || !usage.Shared && counts[address] == 0 {
			cost += int64(open)
		}
	}
	return cost
}

// identityChanges says what makes an identity another one.
func identityChanges(before, after *exchange.Pool) []string {
	one, other := before.Spec.GetTls(), after.Spec.GetTls()
	var changes []string
	note := func(changed bool, what string) {
		if changed {
			changes = append(changes, what)
		}
	}
	note(!before.TLS.RootCAs.Equal(after.TLS.RootCAs), "trust")
	note(!slices.Equal(one.GetSubjectAltNames(), other.GetSubjectAltNames()) || one.GetInsecureSkipVerify() != other.GetInsecureSkipVerify() ||
		one.GetSubjectCommonName() != other.GetSubjectCommonName(), "verification")
	note(!slices.Equal(before.TLS.NextProtos, after.TLS.NextProtos), "protocol")
	note(!samePolicy(before.TLS, after.TLS) || one.GetRenegotiation() != other.GetRenegotiation(), "TLS policy")
	note(before.Spec.GetSessions().GetSharing() != after.Spec.GetSessions().GetSharing(), "session sharing")
	if one.GetClientCertificate() != other.GetClientCertificate() || len(changes) == 0 && other.GetClientCertificate() != "" {
		changes = append(changes, "client certificate")
	}
	if len(changes) == 0 {
		changes = append(changes, "identity")
	}
	return changes
}

func samePolicy(a, b *tls.Config) bool {
	return a.MinVersion == b.MinVersion && a.MaxVersion == b.MaxVersion &&
		slices.Equal(a.CipherSuites, b.CipherSuites) && slices.Equal(a.CurvePreferences, b.CurvePreferences)
}

// listenerImpacts compares the listeners that serve with those to come.
func (e *Edge) listenerImpacts(next []exchange.Listener, held map[string]bool) []*resealv1.ListenerImpact {
	var impacts []*resealv1.ListenerImpact
	serving := e.frontend.Usage()
	add := func(name string, action resealv1.ListenerImpact_Action, address string, connections int) {
		if held["Listener/"+name] || len(impacts) == maxImpacts {
			return
		}
		impacts = append(impacts, &resealv1.ListenerImpact{Name: name, Action: action, Address: address, Connections: int64(connections)})
	}
	for _, listener := range next {
		now, ok := serving[listener.Name]
		delete(serving, listener.Name)
		address := listener.Spec.GetAddress()
		switch {
		case !ok:
			add(listener.Name, resealv1.ListenerImpact_ACTION_OPENS, address, 0)
		case now.Listener.Spec.GetAddress() != address:
			add(listener.Name, resealv1.ListenerImpact_ACTION_MOVES, address, now.Clients)
		case now.Listener.PolicyKey != listener.PolicyKey || now.Listener.Keyring != listener.Keyring:
			add(listener.Name, resealv1.ListenerImpact_ACTION_DECLINES_TICKETS, address, 0)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(serving)) {
		add(name, resealv1.ListenerImpact_ACTION_CLOSES, "", serving[name].Clients)
	}
	slices.SortFunc(impacts, func(a, b *resealv1.ListenerImpact) int { return strings.Compare(a.GetName(), b.GetName()) })
	return impacts
}
