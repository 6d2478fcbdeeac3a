package controlplane

import (
	"context"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"

	"github.com/reseal/reseal/controlplane/audit"
	"github.com/reseal/reseal/controlplane/gate"
	"github.com/reseal/reseal/controlplane/trust"
)

const (
	// maxMessage bounds what a caller may send, in bytes. Those without a
	// certificate may send much less (gate.MaxBytes).
	maxMessage = 16 << 20
	// maxHeaders bounds the metadata of a call, in bytes.
	maxHeaders = 64 << 10
	// connectTimeout is how long a connection may take to be ready: as long as edges
	// wait when all of a fleet connect at once. The gate ends those that say nothing
	// long before.
	connectTimeout = 30 * time.Second
	// streamWindow is what a caller may send on a stream before it is read, in bytes.
	streamWindow = 256 << 10
)

type healthServer struct{ *health.Server }

func (h *healthServer) serving() { h.SetServingStatus("", healthpb.HealthCheckResponse_SERVING) }

// versionHeader is the response header that tells the control plane's version.
const versionHeader = "reseal-version"

// tellVersion answers health checks with the version, for resealctl version.
func tellVersion(version string) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if info.FullMethod == healthpb.Health_Check_FullMethodName {
			if err := grpc.SetHeader(ctx, metadata.Pairs(versionHeader, version)); err != nil {
				return nil, err
			}
		}
		return handler(ctx, req)
	}
}

func newGRPCServer(t *trust.Trust, log *audit.Log, door *gate.Gate, codec encoding.CodecV2, version string) (*grpc.Server, *healthServer) {
	server := grpc.NewServer(
		grpc.Creds(door.Credentials(t.Credentials())),
		// Callers that will be refused are, before their message is decoded.
		grpc.InTapHandle(t.Tap),
		grpc.ChainUnaryInterceptor(t.UnaryInterceptor, log.UnaryInterceptor, tellVersion(version)),
		grpc.ChainStreamInterceptor(t.StreamInterceptor, log.StreamInterceptor),
		grpc.ForceServerCodecV2(codec),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(256),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		// Thousands of mostly idle streams: buffers only while they are used, and
		// windows for what edges send, which is little; without an estimate of how
		// much more there could be, which costs a ping for each message.
		grpc.ReadBufferSize(0),
		grpc.WriteBufferSize(4096),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(4*streamWindow),
	)
	h := &healthServer{health.NewServer()}
	h.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
	healthpb.RegisterHealthServer(server, h)
	reflection.Register(server)
	return server, h
}

// newHandler makes the page. A control plane that holds a configuration is ready,
// whatever else does not work: edges and readers are served. problem says what
// that is, "" for nothing.
func newHandler(registry *prometheus.Registry, ready <-chan struct{}, problem func() string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok\n"))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		select {
		case <-ready:
			text := "ok\n"
			if trouble := problem(); trouble != "" {
				text += "but: " + trouble + "\n"
			}
			_, _ = io.WriteString(w, text)
		default:
			http.Error(w, strings.TrimSuffix("the store is not loaded yet; "+problem(), "; "), http.StatusServiceUnavailable)
		}
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	return mux
}
