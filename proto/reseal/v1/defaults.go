package resealv1

import (
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
)

// DefaultKeyring is the name of the Keyring that exists from the start.
const DefaultKeyring = "default"

// SecretMarker stands in place of a write-only value in everything that is
// read. As a value in a manifest it is an error.
const SecretMarker = "<redacted>"

// The functions below return a copy of a spec in which every field that has a
// default holds a value. The proto comments state the same defaults. Stored
// resources keep what the operator wrote.

// WithDefaults returns a copy of p with defaults filled in.
func (p *BackendPool) WithDefaults() *BackendPool {
	p = cloneOrNew(p)
	setEnum(&p.Protocol, BackendPool_PROTOCOL_AUTO)
	for _, endpoint := range p.Endpoints {
		setOptional(&endpoint.Weight, 1)
	}
	if p.Dns != nil {
		setDuration(&p.Dns.RefreshInterval, 10*time.Second)
	}
	p.Tls = orNew(p.Tls)
	if p.Tls.Trust.GetRoots() == nil {
		p.Tls.Trust = &BackendTLS_Trust{Roots: &BackendTLS_Trust_System{System: true}}
	}
	setEnum(&p.Tls.Renegotiation, BackendTLS_RENEGOTIATION_NEVER)
	p.Sessions = orNew(p.Sessions)
	setEnum(&p.Sessions.Mode, Sessions_MODE_AUTO)
	setEnum(&p.Sessions.Scope, Sessions_SCOPE_ENDPOINT)
	setEnum(&p.Sessions.Sharing, Sessions_SHARING_EDGE)
	setDuration(&p.Sessions.CoalesceTimeout, 2*time.Second)
	setDuration(&p.Sessions.TicketWait, 50*time.Millisecond)
	setEnum(&p.Sessions.SessionIds, Sessions_SESSION_IDS_AUTO)
	p.Connections = orNew(p.Connections)
	setEnum(&p.Connections.Reuse, Connections_REUSE_ALWAYS)
	setUint(&p.Connections.MaxIdlePerEndpoint, 256)
	setDuration(&p.Connections.IdleTimeout, time.Minute)
	setUint(&p.Connections.MaxPerEndpoint, 1024)
	setUint(&p.Connections.MaxPending, 1024)
	setDuration(&p.Connections.CloseTimeout, time.Second)
	p.LoadBalancing = orNew(p.LoadBalancing)
	setEnum(&p.LoadBalancing.Algorithm, LoadBalancing_ALGORITHM_LEAST_REQUEST)
	if p.LoadBalancing.HashOn == "" {
		p.LoadBalancing.HashOn = "source_ip"
	}
	p.defaultFailureHandling()
	return p
}

func (p *BackendPool) defaultFailureHandling() {
	if check := p.HealthCheck; check != nil {
		if check.Path == "" {
			check.Path = "/"
		}
		if check.Method == "" {
			check.Method = "GET"
		}
		if check.ServerName == "" {
			check.ServerName = p.Tls.ServerName
		}
		setDuration(&check.Interval, 10*time.Second)
		setDuration(&check.Timeout, 2*time.Second)
		setUint(&check.HealthyThreshold, 2)
		setUint(&check.UnhealthyThreshold, 3)
	}
	p.OutlierDetection = orNew(p.OutlierDetection)
	setOptional(&p.OutlierDetection.ConsecutiveErrors, 5)
	setDuration(&p.OutlierDetection.EjectionTime, 30*time.Second)
	setOptional(&p.OutlierDetection.MaxEjectionPercent, 50)
	if len(p.OutlierDetection.Statuses) == 0 {
		p.OutlierDetection.Statuses = []uint32{502, 503, 504}
	}
	p.Timeouts = orNew(p.Timeouts)
	setDuration(&p.Timeouts.Connect, 2*time.Second)
	setDuration(&p.Timeouts.Handshake, 5*time.Second)
	setDuration(&p.Timeouts.ResponseHeader, time.Minute)
	setDuration(&p.Timeouts.Idle, time.Minute)
	p.Retries = orNew(p.Retries)
	setOptional(&p.Retries.Attempts, 1)
	if len(p.Retries.On) == 0 {
		p.Retries.On = []Retries_Condition{Retries_CONDITION_CONNECT_FAILURE, Retries_CONDITION_STALE_CONNECTION}
	}
}

// WithDefaults returns a copy of p with defaults filled in. A nil p is a policy
// with default values. Empty alpn, cipherSuites and curves stay empty.
func (p *TLSPolicy) WithDefaults() *TLSPolicy {
	p = cloneOrNew(p)
	setEnum(&p.MinVersion, TLSVersion_TLS_VERSION_TLS1_2)
	setEnum(&p.MaxVersion, TLSVersion_TLS_VERSION_TLS1_3)
	p.Resumption = orNew(p.Resumption)
	setOptional(&p.Resumption.Enabled, true)
	setDuration(&p.Resumption.TicketLifetime, 12*time.Hour)
	if p.Resumption.Keyring == "" {
		p.Resumption.Keyring = DefaultKeyring
	}
	p.ClientAuth = orNew(p.ClientAuth)
	setEnum(&p.ClientAuth.Mode, ClientAuth_MODE_NONE)
	return p
}

// WithDefaults returns a copy of l with defaults filled in.
func (l *Listener) WithDefaults() *Listener {
	l = cloneOrNew(l)
	setEnum(&l.Protocol, Listener_PROTOCOL_HTTPS)
	l.Limits = orNew(l.Limits)
	setUint(&l.Limits.MaxConnections, 65536)
	setUint(&l.Limits.MaxHeaderBytes, 65536)
	setUint(&l.Limits.MaxConcurrentStreams, 250)
	setUint(&l.Limits.MaxHeaderFields, 100)
	l.Timeouts = orNew(l.Timeouts)
	setDuration(&l.Timeouts.Handshake, 10*time.Second)
	setDuration(&l.Timeouts.Header, 10*time.Second)
	setDuration(&l.Timeouts.Idle, 75*time.Second)
	setDuration(&l.Timeouts.Drain, 30*time.Second)
	l.ClientCertificate = orNew(l.ClientCertificate)
	setEnum(&l.ClientCertificate.Forward, ClientCertificate_FORWARD_NONE)
	return l
}

// WithDefaults returns a copy of r with defaults filled in.
func (r *Route) WithDefaults() *Route {
	r = cloneOrNew(r)
	for _, pool := range r.Pools {
		setOptional(&pool.Weight, 1)
	}
	return r
}

// WithDefaults returns a copy of k with defaults filled in.
func (k *Keyring) WithDefaults() *Keyring {
	k = cloneOrNew(k)
	setDuration(&k.RotationInterval, time.Hour)
	setDuration(&k.RetireAfter, 12*time.Hour)
	setDuration(&k.MaxActiveAge, 24*time.Hour)
	return k
}

// DefaultRollout is the name of the RolloutPolicy that counts.
const DefaultRollout = "default"

// WithDefaults returns a copy of p with defaults filled in, but for the soak of
// stages, whose default depends on the fleet.
func (p *RolloutPolicy) WithDefaults() *RolloutPolicy {
	p = cloneOrNew(p)
	if len(p.Stages) == 0 {
		p.Stages = []*RolloutStage{{Percent: 1}, {Percent: 10}, {Percent: 100}}
	}
	p.Gates = orNew(p.Gates)
	for gate, allowed := range map[**RolloutGate]uint32{&p.Gates.Errors: 5, &p.Gates.FullHandshakes: 50, &p.Gates.Latency: 50} {
		*gate = orNew(*gate)
		setUint(&(*gate).AllowedPercent, allowed)
		setUint(&(*gate).MinSamples, 20)
	}
	setEnum(&p.OnFailure, RolloutPolicy_ON_FAILURE_UNDO)
	return p
}

// cloneOrNew copies m, or makes one when m is nil.
func cloneOrNew[T any, M interface {
	*T
	proto.Message
}](m M) M {
	if m == nil {
		return new(T)
	}
	return proto.CloneOf(m)
}

func orNew[T any](m *T) *T {
	if m == nil {
		return new(T)
	}
	return m
}

func setEnum[E ~int32](field *E, value E) {
	if *field == 0 {
		*field = value
	}
}

func setUint(field *uint32, value uint32) {
	if *field == 0 {
		*field = value
	}
}

func setOptional[T any](field **T, value T) {
	if *field == nil {
		*field = &value
	}
}

func setDuration(field **durationpb.Duration, value time.Duration) {
	if *field == nil {
		*field = durationpb.New(value)
	}
}
