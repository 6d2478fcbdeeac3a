package backup

import (
	"bufio"
	"log/slog"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// pieceSize is how many bytes a piece has.
const pieceSize = 256 << 10

// Server implements BackupService.
type Server struct {
	resealv1.UnimplementedBackupServiceServer

	// Client is the connection to etcd. Required, as are all fields.
	Client *clientv3.Client
	// Prefix is what all keys begin with.
	Prefix string
	// Cipher seals the backup.
	Cipher Cipher
	// Logger is for the operator of this process.
	Logger *slog.Logger

	busy chan struct{}
}

// NewServer makes a Server. It makes one backup at a time.
func NewServer(client *clientv3.Client, prefix string, cipher Cipher, logger *slog.Logger) *Server {
	return &Server{Client: client, Prefix: prefix, Cipher: cipher, Logger: logger, busy: make(chan struct{}, 1)}
}

// Backup implements resealv1.BackupServiceServer.
func (s *Server) Backup(_ *resealv1.BackupRequest, stream grpc.ServerStreamingServer[resealv1.BackupResponse]) error {
	select {
	case s.busy <- struct{}{}:
		defer func() { <-s.busy }()
	default:
		return status.Error(codes.ResourceExhausted, "another backup is being made")
	}
	out := bufio.NewWriterSize(pieces{stream}, pieceSize)
	keys, err := Write(stream.Context(), s.Client, s.Prefix, s.Cipher, out)
	if err == nil {
		err = out.Flush()
	}
	if err == nil {
		err = stream.Send(&resealv1.BackupResponse{Keys: int64(keys)})
	}
	if err == nil {
		s.Logger.Info("backup made", "keys", keys)
		return nil
	}
	s.Logger.Warn("a backup could not be made", "error", err)
	return status.Errorf(codes.Unavailable, "%v", err)
}

// pieces sends what is written.
type pieces struct {
	stream grpc.ServerStreamingServer[resealv1.BackupResponse]
}

// Write implements io.Writer.
func (p pieces) Write(data []byte) (int, error) {
	for rest := data; len(rest) > 0; {
		piece := rest[:min(len(rest), pieceSize)]
		if err := p.stream.Send(&resealv1.BackupResponse{Data: append([]byte(nil), piece...)}); err != nil {
			return 0, err
		}
		rest = rest[len(piece):]
	}
	return len(data), nil
}
