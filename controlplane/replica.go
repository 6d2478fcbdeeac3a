package controlplane

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"

	"github.com/reseal/reseal/controlplane/etcd"
	"github.com/reseal/reseal/controlplane/intent"
	"github.com/reseal/reseal/controlplane/replicas"
	"github.com/reseal/reseal/controlplane/sessions"
	"github.com/reseal/reseal/controlplane/trust"
	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// newGroup makes this replica known to the others, once it runs.
func (c *ControlPlane) newGroup(kept *etcd.Store, listening net.Addr, edges func() int) (*replicas.Group, error) {
	name := c.cfg.ReplicaName
	if name == "" {
		name = replicaName(listening)
	}
	config, err := c.trust.ReplicaTLS(name)
	if err != nil {
		return nil, fmt.Errorf("--replica-name: %w", err)
	}
	address := c.cfg.ReplicaAddress
	if address == "" {
		address = replicaAddress(listening, c.cfg.EtcdEndpoints)
	}
	return replicas.New(replicas.Config{
		Client:     kept.Client,
		ID:         name,
		Address:    address,
		Advertised: c.cfg.Advertise,
		Version:    c.cfg.Version,
		Edges:      edges,
		TLS:        config,
		Logger:     c.cfg.Logger.With("part", "replicas"),
		Registerer: c.registry,
	}), nil
}

// joinGroup makes this replica known when it serves.
func (c *ControlPlane) joinGroup(ctx context.Context, group *replicas.Group) error {
	select {
	case <-c.ready:
	case <-ctx.Done():
	}
	return group.Run(ctx)
}

// relaying is the ReplicaService.
type relaying struct {
	resealv1.UnimplementedReplicaServiceServer
	sessions *sessions.Server
}

// Relay implements resealv1.ReplicaServiceServer.
func (r relaying) Relay(stream grpc.ClientStreamingServer[resealv1.RelayRequest, resealv1.RelayResponse]) error {
	who, err := trust.Caller(stream.Context())
	if err != nil {
		return err
	}
	return r.sessions.Relay(who.Name, stream)
}

// relay tells each of the other replicas of the sessions that edges share.
func relay(group *replicas.Group, server *sessions.Server) func(context.Context) error {
	return func(ctx context.Context) error {
		return group.Each(ctx, func(ctx context.Context, id string, conn grpc.ClientConnInterface) error {
			return server.RelayTo(ctx, id, resealv1.NewReplicaServiceClient(conn))
		})
	}
}

// orders keeps what operators order edges.
func (c *ControlPlane) orders(kept *intent.Store) replicas.Orders {
	return replicas.Orders{
		Drain: func(ctx context.Context, edge string, timeout time.Duration) error {
			return kept.Drain(ctx, edge, intent.Drain{Timeout: timeout, By: c.author(ctx), At: time.Now().UTC()})
		},
		Undrain:  kept.Undrain,
		Drained:  func(edge string) bool { return kept.Drained(edge) != nil },
		Enrolled: c.trust.Enrolled,
	}
}

// leaderName is how people know this replica: its name, or the listening address,
// with the host's name where that is any address.
func leaderName(name string, address net.Addr) string {
	host, port, err := net.SplitHostPort(address.String())
	switch {
	case name != "":
		return name
	case err != nil:
		return address.String()
	}
	if ip := net.ParseIP(host); ip != nil && ip.IsUnspecified() {
		if name, err := os.Hostname(); err == nil {
			host = name
		}
	}
	return net.JoinHostPort(host, port)
}

// replicaName is leaderName as it can stand in an identity.
func replicaName(address net.Addr) string {
	host, port, err := net.SplitHostPort(leaderName("", address))
	if err != nil {
		host = address.String()
	}
	name := strings.Map(func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9', r == '.', r == '_', r == '-':
			return r
		}
		return '-'
	}, host)
	return name[:min(len(name), 50)] + "-" + port
}

// replicaAddress is where other replicas reach this one. Without an etcd cluster
// there are no others.
func replicaAddress(listening net.Addr, endpoints []string) string {
	host, port, err := net.SplitHostPort(listening.String())
	if err != nil {
		return listening.String()
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsUnspecified() {
		return listening.String()
	}
	for _, endpoint := range endpoints {
		target := endpoint
		if parsed, err := url.Parse(endpoint); err == nil && parsed.Host != "" {
			target = parsed.Host
		}
		// UDP sends nothing before it is written to.
		if conn, err := net.Dial("udp", target); err == nil {
			host, _, err := net.SplitHostPort(conn.LocalAddr().String())
			_ = conn.Close()
			if err == nil {
				return net.JoinHostPort(host, port)
			}
		}
	}
	return net.JoinHostPort("127.0.0.1", port)
}
