package main

import resealv1 "github.com/reseal/reseal/proto/reseal/v1"

// explanation says what a counted reason means and what to do about it.
type explanation struct {
	meaning string
	advice  string
}

// explainMiss explains why handshakes were full.
func explainMiss(reason resealv1.MissReason) explanation {
	switch reason {
	case resealv1.MissReason_MISS_REASON_NO_SESSION:
		return explanation{
			"There was no session yet: the first handshake of an edge with an endpoint and a server name.",
			"Each edge, endpoint and server name has its own. Fewer server names (spec.tls.serverName), sessions.scope: pool when the endpoints share ticket keys, or sessions.sharing: fleet reduce the number."}
	case resealv1.MissReason_MISS_REASON_EXPIRED:
		return explanation{
			"The session was older than its lifetime, or the certificate in it had expired.",
			"Give tickets or sessions a longer lifetime at the backend, or keep connections open for longer: connections.idleTimeout."}
	case resealv1.MissReason_MISS_REASON_DECLINED:
		return explanation{
			"The backend was offered a session and answered with a full handshake: it had forgotten the session.",
			"Look for restarts of the backend, for several servers behind one address that don't share sessions or ticket keys (name each as an endpoint), and for a session cache that is too small or too short-lived. resealctl probe shows which."}
	case resealv1.MissReason_MISS_REASON_DECLINED_AFTER_UNCLEAN_CLOSE:
		return explanation{
			"The backend declined a session after one of its connections had ended without close_notify; some servers must then forget it.",
			"Find out what ends connections like that: the closes by kind show it, and an edge that crashed or was killed is one cause. Raise connections.closeTimeout when they show timeout or reset_by_us; look at the backend, and at firewalls in between, when they show reset_by_peer or fin_without_notify."}
	case resealv1.MissReason_MISS_REASON_EVICTED:
		return explanation{
			"The edge dropped the session to bound its memory: the pool has more server names than an edge keeps sessions for.",
			"Set spec.tls.serverName if the backends accept one name for all hosts, or split the hosts over several pools."}
	case resealv1.MissReason_MISS_REASON_SINGLE_USE_SPENT:
		return explanation{
			"The backend takes each ticket once, and all those that it had given out were spent.",
			"Have it give more tickets per connection (OpenSSL: num_tickets), or let tickets be used again; keep connections open for longer, so that fewer are needed."}
	case resealv1.MissReason_MISS_REASON_VERSION_CHANGED:
		return explanation{
			"The backend chose a TLS version other than the session's.",
			"Let all servers behind the endpoint speak the same versions, or fix one with a TLSPolicy (minVersion, maxVersion) in spec.tls.policy."}
	case resealv1.MissReason_MISS_REASON_POLICY_CHANGED:
		return explanation{
			"Trust, verification, client certificate, TLS policy, protocol or sessions.sharing of the pool changed, so its sessions had to go.",
			"It happens once with each such change and calls for no action; if it goes on, see what keeps changing: resealctl history, and caFile and certificateFile on the edges."}
	case resealv1.MissReason_MISS_REASON_UNSUPPORTED_BY_PEER:
		return explanation{
			"The backend gives out neither session IDs that can be offered nor tickets.",
			"Switch on session IDs or tickets at the backend. Until then only open connections save handshakes: connections.idleTimeout, connections.maxIdlePerEndpoint."}
	case resealv1.MissReason_MISS_REASON_COALESCE_TIMEOUT:
		return explanation{
			"A handshake waited for the session of another one that was under way, and then went ahead alone.",
			"The backend's handshakes or tickets are slow: raise sessions.coalesceTimeout above what a handshake takes, and see what slows the backend."}
	case resealv1.MissReason_MISS_REASON_DISABLED:
		return explanation{
			"Resumption is switched off for this pool.",
			"Set sessions.mode: auto, unless a full handshake for each connection is wanted."}
	}
	return explainFrontendMiss(reason)
}

// explainSpent explains declined at a backend that takes each ticket once, as
// single_use_spent next to it shows: it had not forgotten what was offered.
func explainSpent() explanation {
	return explanation{
		"The backend takes each TLS 1.3 ticket once: sessions that were offered a second time, which is how that is found out, were answered with a full handshake.",
		"Let the backend take tickets again (stateless tickets: a JSSE service with one name in its certificate, OpenSSL without early data) or give more per connection (OpenSSL: num_tickets), and keep connections open for longer, so that fewer are needed. resealctl probe shows how many it gives."}
}

// explainFrontendMiss explains the reasons of listeners.
func explainFrontendMiss(reason resealv1.MissReason) explanation {
	switch reason {
	case resealv1.MissReason_MISS_REASON_NOT_OFFERED:
		return explanation{
			"The client offered no ticket: it is new, or keeps none.",
			"Nothing on this side; clients that keep tickets resume."}
	case resealv1.MissReason_MISS_REASON_KEY_UNKNOWN:
		return explanation{
			"The ticket was encrypted under a key that this edge does not know.",
			"Let all edges behind one address select the same keyring, and see whether this edge is connected: resealctl get edges."}
	case resealv1.MissReason_MISS_REASON_KEY_RETIRED:
		return explanation{
			"The ticket's key has been erased since.",
			"Raise the keyring's retireAfter towards the policy's ticketLifetime."}
	case resealv1.MissReason_MISS_REASON_POLICY_MISMATCH:
		return explanation{
			"The ticket was issued under another policy.",
			"Policies that differ can't share tickets; nothing needs to be done after a change of policy."}
	case resealv1.MissReason_MISS_REASON_UNDECRYPTABLE:
		return explanation{
			"The ticket is damaged or forged.",
			"A few are background noise of the Internet; many come from tickets of another fleet behind the same name."}
	case resealv1.MissReason_MISS_REASON_STALE_KEYRING:
		return explanation{
			"No fresh key has reached the edge for longer than the keyring's maxActiveAge.",
			"Bring back the edge's connection to the control plane: resealctl get edges."}
	case resealv1.MissReason_MISS_REASON_REFUSED:
		return explanation{
			"The ticket was good, but TLS did not resume from it: version, cipher suite, client certificate or ALPN differ.",
			"It settles as clients get new tickets; if it goes on, see which parameters differ between edges."}
	}
	return explanation{"This version of resealctl does not know the reason.", "Use the resealctl of the control plane's version."}
}

// explainClose explains how connections to backends ended. clean says that
// sessions live on after it.
func explainClose(kind resealv1.CloseKind) (meaning string, clean bool) {
	switch kind {
	case resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_BOTH:
		return "Closed in good order on both sides.", true
	case resealv1.CloseKind_CLOSE_KIND_CLOSE_NOTIFY_SENT:
		return "We sent close_notify, the backend closed TCP without one. Sessions live on.", true
	case resealv1.CloseKind_CLOSE_KIND_FIN_WITHOUT_NOTIFY:
		return "The backend, or something between, closed TCP without close_notify.", false
	case resealv1.CloseKind_CLOSE_KIND_RESET_BY_PEER:
		return "The backend, or something between, reset the connection.", false
	case resealv1.CloseKind_CLOSE_KIND_RESET_BY_US:
		return "The edge reset the connection: there was no time to close it in good order.", false
	case resealv1.CloseKind_CLOSE_KIND_TIMEOUT:
		return "The backend did not answer our close_notify within connections.closeTimeout.", false
	}
	return "This version of resealctl does not know the kind.", true
}

// missByLabel and closeByLabel find enum values by how statistics name them.
func missByLabel(label string) resealv1.MissReason {
	for number := range resealv1.MissReason_name {
		if reason := resealv1.MissReason(number); resealv1.Label(reason) == label {
			return reason
		}
	}
	return resealv1.MissReason_MISS_REASON_UNSPECIFIED
}

func closeByLabel(label string) resealv1.CloseKind {
	for number := range resealv1.CloseKind_name {
		if kind := resealv1.CloseKind(number); resealv1.Label(kind) == label {
			return kind
		}
	}
	return resealv1.CloseKind_CLOSE_KIND_UNSPECIFIED
}
